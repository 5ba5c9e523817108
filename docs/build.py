"""Build the site:  python docs/build.py [--strict] [--open]

nbs/*.ipynb -> docs/_build/src (MyST notebooks, by nbmyst.py) -> docs/_build/html (Sphinx).
Everything comes from installed packages and this repository: no network, no Quarto. Nothing outside docs/_build is written.
"""
import argparse, importlib.util, os, shutil, sys, time, webbrowser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
docs, build = root/"docs", root/"docs"/"_build"

def mathjax():
    "MathJax in one file, without fonts to fetch: from the package sphinx-mathjax-offline"
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None: sys.exit("MathJax is missing: pip install -e '.[dev]' (it comes with sphinx-mathjax-offline)")
    return Path(spec.origin).parent/"static"/"mathjax"/"tex-svg.js"

def source(src):
    "Write what Sphinx reads, and return the problems found on the way"
    from nbmyst import Site
    shutil.rmtree(src, ignore_errors=True)
    shutil.copytree(docs/"_static", src/"_static")
    shutil.copy2(mathjax(), src/"_static"/"mathjax-tex-svg.js")
    shutil.copytree(docs/"_templates", src/"_templates")
    shutil.copy2(docs/"conf.py", src/"conf.py")
    site = Site(root)
    if "index.ipynb" not in {p.path.name for p in site.pages}: sys.exit("nbs/index.ipynb is missing: it is the front page")
    for d in ("images", "results"):
        if (site.nbs/d).is_dir(): shutil.copytree(site.nbs/d, src/d, ignore=shutil.ignore_patterns("*.ipynb", ".*"))
    problems = site.write(src)
    import execnb.nbio as nbio
    front = nbio.read_nb(src/"index.ipynb")
    front.cells.append(nbio.mk_cell(site.toctree(), "markdown"))
    nbio.write_nb(front, src/"index.ipynb")
    return problems

def main():
    p = argparse.ArgumentParser(description="Build the site from the notebooks")
    p.add_argument("--strict", action="store_true", help="any warning is an error")
    p.add_argument("--open", action="store_true", help="open the front page in a browser")
    args = p.parse_args()
    os.chdir(root)
    sys.path[:0] = [str(docs), str(root)]
    start = time.time()
    from nbmyst import BuildError
    src, out = build/"src", build/"html"
    try: problems = source(src)
    except BuildError as e: sys.exit(f"docs: {e}")
    for msg in problems: print(f"WARNING: {msg}", file=sys.stderr)
    pages = time.time() - start
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(build/"doctrees", ignore_errors=True)
    from sphinx.cmd.build import main as sphinx
    opts = ["-b", "html", "-n", "-q", "--keep-going", "-d", str(build/"doctrees")] + (["-W"] if args.strict else [])
    rc = sphinx([*opts, str(src), str(out)])
    if args.strict and problems: rc = rc or 1
    if rc: sys.exit(f"docs: failed ({len(problems)} problems in links and names; Sphinx's own are above)")
    print(f"docs: {len(list(out.glob('*.html')))} pages in {time.time()-start:.0f} s (of which {pages:.0f} s for reading the notebooks)")
    print(f"open {out/'index.html'}")
    if args.open: webbrowser.open((out/"index.html").as_uri())

if __name__ == "__main__": main()
