"""nbdev notebooks -> MyST notebooks, which Sphinx renders.

`nbs/` stays plain Jupyter with nbdev's directives. nbdev's `NBProcessor` reads them; the processors below
turn each notebook into one that myst-nb understands:

- an exported definition gets a `py:` object in front of it (signature, docstring, table of docments), so that
  names can be linked to, are checked (`sphinx -n -W`) and appear in the page's contents, the search and the index;
- the source of `#| exports` cells stays in view, that of `#| export` cells is folded, `#| exporti` is left out;
- names in backticks become links: to our objects by a checked role, to fastai, fastcore, torch, numpy and Python by
  nbdev's own lookup tables (installed packages, no network);
- `#| echo: false`, `output: false`, `include: false`, `code-fold`, `fig-cap`, ... become cell tags;
- links to notebooks become links to pages, links to other files of the repository links to its host.
"""
import ast, importlib, inspect, posixpath, re
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

from execnb.nbio import mk_cell, write_nb
from fastcore.basics import AttrDict
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.process import NBProcessor, Processor
from nbdev.processors import (_def_names, _default_exp, clean_magics, filter_stream_, hide_, hide_line,
                              populate_language, rm_export, rm_header_dash, strip_ansi)

class BuildError(Exception): "A page cannot be made; the message says which and why."

# ---------------------------------------------------------------------------------------------- the whole site
@dataclass
class Page:
    "One notebook and what became of it"
    path: Path
    nb: object = None
    mod: str = None                              # full name of the module that it exports
    title: str = ""
    objects: dict = field(default_factory=dict)  # name inside the module -> object, those with an entry on the page
    @property
    def name(self): return Path(_nbpath2html(Path(self.path.name))).stem
    @property
    def number(self):
        m = re.match(r"\d+", self.path.name)
        return int(m[0]) if m else None

class Site:
    "All pages, and where every name leads"
    def __init__(self, root):
        self.root, self.cfg = Path(root).resolve(), get_config()
        self.lib, self.nbs = self.cfg.lib_name, self.cfg.nbs_path
        self.blob = f"{self.cfg.git_url}/blob/{self.cfg.branch}"
        files = sorted(p for p in self.nbs.glob("*.ipynb") if p.name[0] not in "._")
        self.pages = [Page(p) for p in files]
        self.by_file = {p.path.name: p for p in self.pages} | {f"{p.name}.ipynb": p for p in self.pages}
        self.targets, self.problems = {}, []     # bare or dotted name -> (role, full name)

    def warn(self, page, msg): self.problems.append(f"{page.path.name}: {msg}")

    def write(self, out):
        "Write all pages to `out` and return the problems found"
        for p in self.pages: self.read(p)
        for p in self.pages: self.index(p)
        links = Links(self)
        for p in self.pages:
            p.nb = NBProcessor(nb=p.nb, procs=[ApiEntries(p, self, links), Prose(p, self, links), Options(p),
                                               Outputs(p)], process=True).nb
            write_nb(p.nb, Path(out)/f"{p.name}.ipynb")
        return self.problems

    def read(self, page):
        "First pass: nbdev's own processors, and which definitions get an entry"
        mod = _default_exp(NBProcessor(page.path, rm_directives=False).nb)
        page.mod = f"{self.lib}.{mod}" if mod else None
        page.nb = NBProcessor(page.path, process=True, procs=[
            populate_language, FindExports(page), strip_ansi, hide_line, filter_stream_, rm_header_dash,
            clean_magics, hide_, rm_export]).nb
        h1 = [l for c in page.nb.cells if c.cell_type == "markdown" for l in c.source.splitlines() if l.startswith("# ")]
        if not h1: raise BuildError(f"{page.path.name} has no title: its first cell should be '# Title' and '> one-sentence claim'")
        page.title = h1[0][2:].strip()

    def index(self, page):
        "Enter the page's objects into the table that backticks are looked up in"
        if not page.mod: return
        self.targets[page.mod] = ("mod", page.mod)
        for nm in page.objects:
            for alias in (nm, f"{page.mod}.{nm}"): self.targets[alias] = ("obj", f"{page.mod}.{nm}")
        for nm, obj in page.objects.items():     # a method without an entry of its own leads to its class
            if not inspect.isclass(obj): continue
            for m in vars(obj):
                if m[0] != "_":
                    for alias in (f"{nm}.{m}", f"{page.mod}.{nm}.{m}"): self.targets.setdefault(alias, ("obj", f"{page.mod}.{nm}"))

    def toctree(self):
        "Sidebar groups, from the numbers of the notebooks"
        groups = {"Foundations": range(0, 10), "Papers": range(10, 30), "Comparison and tools": range(30, 40), "Reference": range(40, 100)}
        out = []
        for caption, numbers in groups.items():
            entries = [p.name for p in self.pages if p.number in numbers]
            if caption == "Reference": entries.append("Index of names <genindex>")
            if entries: out.append("```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(entries) + "\n```")
        return "\n\n".join(out)

# --------------------------------------------------------------------------------------------------- API entries
def show_value(v):
    "A default as one writes it, without memory addresses"
    if inspect.isclass(v) or inspect.isroutine(v): return v.__name__
    s = re.sub(r" at 0x[0-9a-f]+", "", repr(v))
    s = re.sub(r"^<([\w.]+)[^>]*>$", r"\1()", s)
    return s if len(s) <= 40 else s[:37] + "..."

def show_type(t):
    if t is inspect.Parameter.empty: return ""
    s = t if isinstance(t, str) else t.__name__ if inspect.isclass(t) and not hasattr(t, "__args__") else str(t)
    return re.sub(r"\b(typing|collections\.abc|torch|ssl_notes\.\w+|fastai\.[\w.]+|pathlib)\.", "", s)

def own_init(cls, lib):
    "Does `cls`, or a parent from this library, say how it is made?"
    for k in cls.__mro__:
        if k.__module__.split(".")[0] == lib and ("__init__" in vars(k) or is_dataclass(k) or issubclass(k, tuple)): return True
        if "__init__" in vars(k): return False
    return False

def signature(obj, lib):
    if inspect.isclass(obj) and not own_init(obj, lib): return None
    if isinstance(obj, property): return None
    try: return inspect.signature(obj)
    except (ValueError, TypeError): return None

def show_signature(sig, drop_self, defaults=True):
    if sig is None: return ""
    ps = list(sig.parameters.values())
    if drop_self and ps and ps[0].name in ("self", "cls"): ps = ps[1:]
    out, star = [], False
    for p in ps:
        if p.kind is p.VAR_POSITIONAL: star = True
        if p.kind is p.KEYWORD_ONLY and not star: out.append("*"); star = True
        pre = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        out.append(pre + p.name + ("" if p.default is p.empty or not defaults else f"={show_value(p.default)}"))
    return "(" + ", ".join(out) + ")"

def kind(nm, obj, owner):
    if inspect.isclass(obj): return "exception" if issubclass(obj, BaseException) else "class"
    if owner is None: return "function" if callable(obj) else "data"
    return "property" if isinstance(obj, property) else "method"

class Entry:
    "The `py:` object of one name"
    def __init__(self, page, nm, site, links):
        self.page, self.nm, self.site, self.links = page, nm, site, links
        self.obj = page.objects[nm]
        self.owner = nm.rpartition(".")[0] or None
        self.fn = self.obj.fget if isinstance(self.obj, property) else self.obj
        self.sig = signature(self.obj, site.lib)

    def source_url(self):
        fn = inspect.unwrap(self.fn)
        try: line, file = inspect.getsourcelines(fn)[1], Path(inspect.getsourcefile(fn)).resolve()
        except (OSError, TypeError): return None
        return f"{self.site.blob}/{file.relative_to(self.site.root).as_posix()}#L{line}" if file.is_relative_to(self.site.root) else None

    def docstring(self):
        d = vars(self.fn).get("__doc__") if inspect.isclass(self.fn) else getattr(self.fn, "__doc__", None)
        d = inspect.cleandoc(d or "")
        return "" if d.startswith(self.nm.rpartition(".")[2] + "(") else self.links.linkify(d, self.page)

    def table(self):
        "Two columns: the argument with type and default, and what it means (a phone has room for two)"
        if self.sig is None: return ""
        try: dm = docments(self.fn, full=True, args_kwargs=True)
        except (OSError, TypeError, SyntaxError): return ""
        rows = []
        for k, p in self.sig.parameters.items():
            if k in ("self", "cls"): continue
            v = dm.get(k) or AttrDict(docment=None)
            star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
            rows.append((star + k, show_type(p.annotation), "" if p.default is p.empty else show_value(p.default), v.get("docment") or ""))
        ret = dm.get("return")
        if ret and self.sig.return_annotation is not inspect.Signature.empty and not inspect.isclass(self.obj):
            rows.append(("", show_type(self.sig.return_annotation), "", ret.get("docment") or ""))
        if not any(r[3] for r in rows): return ""
        esc = lambda s: s.replace("\n", " ").replace("|", "\\|")
        def left(n, t, d):
            s = f"`{esc(n)}`{{.arg}}" if n else "returns"
            if t: s += f" `{esc(t)}`{{.type}}"
            if d: s += f" `= {esc(d)}`{{.type}}"
            return s
        body = "\n".join(f"| {left(n, t, d)} | {self.links.linkify(esc(c.strip()), self.page)} |" for n, t, d, c in rows)
        return "{.docments}\n| argument | meaning |\n|---|---|\n" + body

    def signature(self, width=76):
        "Arguments with defaults; only their names where that is too long for a line (the table has the rest)"
        drop = self.owner is not None
        for defaults in (True, False):
            s = show_signature(self.sig, drop, defaults)
            if len(self.nm + s) <= width: return s
        return "(...)"

    def markdown(self, folded):
        k = kind(self.nm, self.obj, self.owner)
        sig = "" if k in ("property", "data") else self.signature()
        opts = [f":module: {self.page.mod}"] + ([":no-contents-entry:"] if self.owner else [])
        if self.owner and isinstance(inspect.getattr_static(self.page.objects.get(self.owner), self.nm.rpartition(".")[2], None), classmethod): opts.append(":classmethod:")
        table, url = self.table(), self.source_url()
        if table and folded: table = f"<details class=\"arguments\"><summary>Arguments</summary>\n\n{table}\n\n</details>"
        parts = [f"[source]({url}){{.api-source}}" if url else "", self.docstring(), table]
        return f"::::{{py:{k}}} {self.nm}{sig}\n" + "\n".join(opts) + "\n\n" + "\n\n".join(p for p in parts if p) + "\n\n::::"

class FindExports(Processor):
    "Note which definitions get an entry; `export` cells become foldable `exports` cells"
    def __init__(self, page): self.page = page
    def begin(self): self.mod = importlib.import_module(self.page.mod) if self.page.mod else None
    def __call__(self, cell):
        if cell.cell_type != "code": return
        if m := re.fullmatch(r"\s*show_doc\(([\w.]+)[^)]*\)\s*", cell.source): return self.shown(cell, [m[1]])
        d = cell.directives_
        if not (d.keys() & {"export", "exports"}) or "hide" in d: return
        cell.shown_ = "exports" in d
        names = [n for n in _def_names(cell, set()) if not any(part.startswith("_") for part in n.split("."))]
        self.shown(cell, names)
        if "export" in d:
            trees = cell.parsed_() or []
            if all(isinstance(t, (ast.Import, ast.ImportFrom)) for t in trees) or cell.source.lstrip().startswith("__all__"): return
            cell.fold_ = True
            d["exports"] = d.pop("export")
            made = _def_names(cell, set()) or [t.id for s in trees if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)]
            cell.what_ = ", ".join(made)
        elif all(isinstance(t, (ast.Import, ast.ImportFrom)) for t in cell.parsed_() or [0]): d["hide"] = []

    def shown(self, cell, names):
        cell.api_ = [n for n in names if n not in self.page.objects]
        for n in cell.api_:
            try:
                o = self.mod
                for part in n.split("."): o = inspect.getattr_static(o, part) if inspect.isclass(o) else getattr(o, part)
            except AttributeError as e:
                raise BuildError(f"{self.page.path.name} exports `{n}`, but {self.page.mod} has no such name ({e}). Run `nbdev_export`.") from None
            if isinstance(o, (classmethod, staticmethod)): o = o.__func__
            self.page.objects[n] = o

class ApiEntries(Processor):
    "Put the entries in front of their cells, and the module's own after the title"
    def __init__(self, page, site, links): self.page, self.site, self.links = page, site, links
    def begin(self):
        out, titled = [], False
        for c in self.nb_cells():
            for n in c.get("api_") or []:
                e = mk_cell(Entry(self.page, n, self.site, self.links).markdown(folded="fold_" not in c), "markdown")
                e.directives_, e.made_ = {}, True
                out.append(e)
            if c.cell_type == "code" and c.source.lstrip().startswith("show_doc("): continue
            out.append(c)
            if self.page.mod and not titled and c.cell_type == "markdown":
                m = mk_cell(f"```{{py:module}} {self.page.mod}\n```", "markdown"); m.directives_, m.made_ = {}, True
                out.append(m); titled = True
        self.page.nb.cells = out
    def nb_cells(self): return self.page.nb.cells

# --------------------------------------------------------------------------------------------------------- prose
_alias = {"nn": "torch.nn", "F": "torch.nn.functional", "np": "numpy", "plt": "matplotlib.pyplot"}
# `name` or `name(...)`, but not as the text of a link, nor inside longer backticks or maths
_tick = re.compile(r"(?<![`\[{}])`([A-Za-z_][\w.]*[\w])(\([^`<>]*\))?`(?![`\]{])")

class Links(NbdevLookup):
    "nbdev's lookup, where our own names become checked roles"
    def __init__(self, site):
        super().__init__()
        self.site, self.args = site, {}

    def own_args(self, page):
        "Names of arguments on this page: `params` is then ours, not a function of fastcore's"
        if page.path not in self.args:
            names = set()
            for o in page.objects.values():
                s = signature(o, self.site.lib)
                if s: names |= set(s.parameters)
            self.args[page.path] = names
        return self.args[page.path]

    def link(self, m, page):
        nm, paren = m[1], m[2] or ""
        t, mine = self.site.targets.get(nm), nm in self.own_args(page)
        if t and not (mine and nm not in page.objects): return f"{{py:{t[0]}}}`{nm}{paren} <{t[1]}>`"
        if nm.startswith(f"{self.site.lib}."):
            if nm.rpartition(".")[2] not in ("ipynb", "py", "data") : self.site.warn(page, f"`{nm}` is not a name on any page")
            return m[0]
        if len(nm) < 4 or mine: return m[0]
        head, dot, rest = nm.partition(".")
        url = self.doc(_alias.get(head, head) + dot + rest) or self.doc(nm)
        if url is None or ".." in nm: 
            if re.fullmatch(r"[A-Z]\w+Callback", nm): self.site.warn(page, f"`{nm}` is no callback of this library or of fastai")
            return m[0]
        if "." not in nm and nm == nm.lower() and "_" not in nm: return m[0]   # an everyday word: `first`, `noise`
        return f"[`{nm}{paren}`]({url})"

    def linkify(self, md, page):
        out, fence = [], None
        for l in md.split("\n"):
            s = l.strip()
            if fence: fence = None if s.startswith(fence) else fence
            elif s.startswith(("```", "~~~", "$$")):
                fence = None if s.startswith("$$") and s.count("$$") > 1 else s[:2] if s.startswith("$$") else s[:3]
            elif not l.startswith(("    ", "#")): l = _tick.sub(lambda m: self.link(m, page), l)
            out.append(l)
        return "\n".join(out)

_mdlink = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)((?:\s+\"[^\"]*\")?)\)")
_claim = re.compile(r"(^# [^\n]+\n+)((?:>[^\n]*\n?)+)", re.M)
# Sphinx puts formulas with `\\` into a `split`, in which MathJax takes no `\tag`; MyST leaves an `equation*` alone.
_tagged = re.compile(r"\$\$((?:(?!\$\$).)*?\\tag(?:(?!\$\$).)*?)\$\$", re.S)
def _equation(m): return f"\\begin{{equation*}}\n{m[1].strip()}\n\\end{{equation*}}" if r"\\" in m[1] else m[0]
_callout = re.compile(r"^> \*\*([A-Za-z][\w ]{2,30}?)[.:]?\*\*", re.M)

class Prose(Processor):
    "Links and the look of blockquotes"
    def __init__(self, page, site, links): self.page, self.site, self.links, self.titled = page, site, links, False

    def local(self, m):
        bang, text, url, title = m.groups()
        if re.match(r"[a-z]+:", url) or url.startswith("#"): return m[0]
        path, _, anchor = url.partition("#")
        if path.endswith(".ipynb"):
            p = self.site.by_file.get(path)
            if p is None: self.site.warn(self.page, f"link to {path}: no such notebook"); return m[0]
            return f"{bang}[{text}]({p.name}.ipynb{'#' + anchor if anchor else ''}{title})"
        full = posixpath.normpath(f"{self.site.nbs.relative_to(self.site.root).as_posix()}/{path}")
        if full.startswith("..") or not (self.site.root/full).exists():
            self.site.warn(self.page, f"link to {url}: no such file in the repository"); return m[0]
        if bang: return m[0]
        return f"[{text}]({self.site.blob}/{full}{'#' + anchor if anchor else ''}{title})"

    def __call__(self, cell):
        if cell.cell_type != "markdown" or cell.get("made_"): return
        src = self.links.linkify(_mdlink.sub(self.local, _tagged.sub(_equation, cell.source)), self.page)
        if not self.titled and src.lstrip().startswith("# "):
            src, self.titled = _claim.sub(r"\1{.lead}\n\2", src, count=1), True
        out, prev = [], ""
        for l in src.split("\n"):                # a blockquote that opens with bold words is a callout of that name
            m = _callout.match(l)
            if m and not prev.startswith((">", "{.")): out.append("{.callout .callout-%s}" % re.sub(r"\W+", "-", m[1].lower()))
            out.append(l); prev = l
        cell.source = "\n".join(out)

# -------------------------------------------------------------------------------------------- options and outputs
_opt = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:\s*(.*?)\s*$")

class Options(Processor):
    "Quarto's cell options, which nbdev leaves in place, as myst-nb's tags"
    def __init__(self, page): self.page = page
    def __call__(self, cell):
        if cell.cell_type != "code": cell.metadata = {}; return
        lines, opts = cell.source.split("\n"), {}
        while lines and (m := _opt.match(lines[0])): opts[m[1]] = m[2].strip("\"'"); lines.pop(0)
        cell.source = "\n".join(lines).strip("\n")
        tags, own = [], {}
        off = lambda k: opts.get(k, "").lower() == "false"
        if off("include") or not (cell.source or cell.get("outputs")): del cell["source"]; return
        if off("echo"): tags.append("remove-input")
        if off("output"): tags.append("remove-output")
        if opts.get("code-fold", "").lower() in ("true", "show") or cell.get("fold_"):
            tags.append("hide-input")
            what = opts.get("code-summary") or (f"Source of {cell.what_}" if cell.get("what_") else "Code")
            own.update(code_prompt_show=what, code_prompt_hide=what)
        if opts.get("fig-cap"): own["figure"] = {"caption": opts["fig-cap"]} | ({"name": opts["label"]} if "label" in opts else {})
        if opts.get("fig-alt"): own["image"] = {"alt": opts["fig-alt"]}
        if cell.get("shown_"): tags.append("equation-code")
        cell.metadata = {"tags": tags} | ({"mystnb": own} if own else {})
        cell.outputs = cell.get("outputs", [])
        cell.execution_count = None

_style = re.compile(r"<style>.*?</style>", re.S)
_bar = re.compile(r"<div>\s*<progress.*?</div>|<progress.*?</progress>", re.S)

class Outputs(Processor):
    "Leftovers of progress bars go, their tables stay"
    def __init__(self, page): self.page = page
    def __call__(self, cell):
        if cell.cell_type != "code": return
        keep = []
        for o in cell.get("outputs", []):
            html = o.get("data", {}).get("text/html")
            if html is not None:
                html = "".join(html)
                if "progress" in html: html = _bar.sub("", _style.sub("", html))
                html = re.sub(r"<table border=\"1\" class=\"dataframe\">", "<table class=\"dataframe\">", html)
                if not re.sub(r"<[^>]+>", "", html).strip() and not re.search(r"<(img|svg|canvas|video|audio)", html): continue
                o["data"]["text/html"] = html
            keep.append(o)
        cell.outputs = keep
