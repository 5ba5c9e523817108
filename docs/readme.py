"""README.md from nbs/index.ipynb, without Quarto:  python docs/readme.py

The same page serves as the site's front page; here nbdev's directives are applied, links are made to work from the
repository's root, and pictures that cells drew are written to nbs/images.
"""
import base64, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def repo_links(md, nbs):
    "Links relative to nbs/ -> links relative to the root"
    def sub(m):
        url = m[2]
        if re.match(r"[a-z]+:|#|/", url): return m[0]
        path, sep, anchor = url.partition("#")
        return m[1] + posixpath.normpath(f"{nbs}/{path}") + sep + anchor + m[3]
    md = re.sub(r"(\]\()([^()\s]+)((?:\s+\"[^\"]*\")?\))", sub, md)
    return re.sub(r"(<img[^>]*?src=\")([^\"]+)(\")", sub, md)

def render(nb, nbs, images):
    "Markdown of a processed notebook; pictures are added to `images` as {path: bytes}"
    out = []
    for c in nb.cells:
        if c.cell_type == "markdown": out.append(repo_links(c.source, nbs)); continue
        if c.cell_type != "code": continue
        opts = {k.rstrip(":"): v for k, v in c.directives_.items() if k.endswith(":")}
        off = lambda k: opts.get(k, [""])[0].lower() == "false"
        if off("include"): continue
        src = "\n".join(l for l in c.source.splitlines() if not re.match(r"\s*#\s*\|", l)).strip()
        if src and not off("echo"): out.append(f"```python\n{src}\n```")
        if off("output"): continue
        for o in c.get("outputs", []):
            data, txt = o.get("data", {}), "".join(o.get("text", []))
            if o.output_type == "error": sys.exit("readme: index.ipynb has an output that is an error")
            if "image/png" in data:
                name = f"{nbs}/images/index_{c.id}.png"
                images[name] = base64.b64decode("".join(data["image/png"]))
                out.append(f"![{' '.join(opts.get('fig-alt', [])) or 'figure'}]({name})".replace('"', ""))
            elif "text/markdown" in data: out.append(repo_links("".join(data["text/markdown"]), nbs))
            elif "text/html" in data and "<table" in "".join(data["text/html"]): out.append("".join(data["text/html"]))
            elif txt or "text/plain" in data: out.append("```\n" + (txt or "".join(data["text/plain"])).rstrip() + "\n```")
    return "\n\n".join(s.strip() for s in out if s.strip()) + "\n"

def main():
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, populate_language, rm_export, rm_header_dash, strip_ansi
    nbs = get_config(path=root).nbs_path.name
    nb = NBProcessor(root/nbs/"index.ipynb", process=True,
                     procs=[populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics, hide_, rm_export]).nb
    images = {}
    text = f"<!-- Generated from {nbs}/index.ipynb by docs/readme.py: edit the notebook. -->\n\n" + render(nb, nbs, images)
    for name, data in images.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    (root/"README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, {len(images)} pictures")

if __name__ == "__main__": main()
