"""How the notebooks are written, and that the repository speaks of itself alone. Reads files, runs nothing."""
import ast, json, re
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
nbs = sorted(f for f in (root/"nbs").glob("*.ipynb") if f.name[0] not in "._")
modules = [f for f in nbs if re.match(r"\d", f.name)]
methods = [f for f in nbs if re.match(r"(1\d|2[0-2])_", f.name)]
names = dict(ids=lambda f: f.stem)

MAX_COLUMNS, MAX_EXPORTED_LINES = 92, 25
# The sections of a page on a method, in order. `Eq. N: ...` stands as often as the paper has equations.
SECTIONS = ["The result", "The idea in one picture", "Notation", "Eq.", "The callback", "A real run", "Knobs", "Paper vs here",
            "Traps", "Exercises", "See also"]

def cells(f): return json.loads(f.read_text(encoding="utf-8"))["cells"]
def src(c): return "".join(c["source"])
def code(f): return [c for c in cells(f) if c["cell_type"] == "code"]
def prose(f): return [c for c in cells(f) if c["cell_type"] == "markdown"]

def directives(c):
    "The names of the leading `#|` lines"
    out = {}
    for l in src(c).splitlines():
        m = re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", l)
        if not m: break
        out[m[1]] = m[2]
    return out

def body(c):
    "The code without directives and blank lines"
    return [l for l in src(c).splitlines() if l.strip() and not re.match(r"\s*#\s*\|", l)]

def exported(c): return directives(c).keys() & {"export", "exports", "exporti"}
def skipped(c): d = directives(c); return d.get("eval") == "false" or bool(d.keys() & {"slow", "cuda", "notest"})
def where(f, c): return f"{f.name}, cell {c.get('id', '?')}"

def headings(f):
    "(level, title) of all headings outside fences"
    for c in prose(f):
        fence = False
        for l in src(c).splitlines():
            if l.startswith("```"): fence = not fence
            elif not fence and (m := re.match(r"(#+)\s+(.*?)\s*$", l)): yield len(m[1]), m[2]

def test_there_is_something_to_read(): assert nbs

# ------------------------------------------------------------------------------------------------------- the shape
@pytest.mark.parametrize("f", nbs, **names)
def test_opens_with_title_and_claim_and_ends_with_export(f):
    cs = cells(f)
    first = next(c for c in cs if c["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n+> \S", src(first)), f"{f.name}: the first markdown cell should be '# Title' and a line '> one-sentence claim'"
    if f in modules and any(exported(c) for c in code(f)):
        assert "default_exp" in directives(cs[0]), f"{f.name}: the first cell should be '#| default_exp module'"
    last = cs[-1]
    assert last["cell_type"] == "code" and "hide" in directives(last) and "nbdev_export()" in src(last), \
        f"{f.name}: the last cell should be '#| hide' and 'import nbdev; nbdev.nbdev_export()'"

@pytest.mark.parametrize("f", methods, **names)
def test_method_pages_have_the_same_sections_in_order(f):
    found = ["Eq." if t.startswith("Eq.") else t for level, t in headings(f) if level == 2]
    known = [t for t in found if t in SECTIONS]
    missing = [t for t in SECTIONS if t not in known]
    assert not missing, f"{f.name} lacks the sections {missing}"
    order = [SECTIONS.index(t) for t in known]
    assert order == sorted(order), f"{f.name}: sections out of order: {known}"
    assert all(known.count(t) == 1 for t in SECTIONS if t != "Eq."), f"{f.name}: a section stands twice"

@pytest.mark.parametrize("f", nbs, **names)
def test_headings_do_not_skip_levels(f):
    levels = [l for l, _ in headings(f)]
    assert levels.count(1) == 1 and levels[0] == 1, f"{f.name}: exactly one H1, first"
    jumps = [(a, b) for a, b in zip(levels, levels[1:]) if b > a + 1]
    assert not jumps, f"{f.name}: headings jump {jumps}"

@pytest.mark.parametrize("f", methods, **names)
def test_each_numbered_equation_has_code_and_a_test(f):
    cs = cells(f)
    tagged = [i for i, c in enumerate(cs) if c["cell_type"] == "markdown" and r"\tag{" in src(c)]
    assert tagged, f"{f.name} has no equation with the paper's number"
    for i in tagged:
        tags = re.findall(r"\\tag\{([^}]*)\}", src(cs[i]))
        nxt = next((j for j in range(i + 1, len(cs)) if cs[j]["cell_type"] == "code"), None)
        assert nxt is not None and "exports" in directives(cs[nxt]), f"{where(f, cs[i])}: equation {tags} should be followed by an '#| exports' cell"
        end = next((j for j in tagged if j > i), len(cs))
        checks = [c for c in cs[nxt+1:end] if c["cell_type"] == "code" and not exported(c) and re.search(r"\b(test_\w+|is_close)\(|\bassert\b", src(c))]
        assert checks, f"{where(f, cs[i])}: no test between equation {tags} and the next one"

# --------------------------------------------------------------------------------------------------------- the code
@pytest.mark.parametrize("f", nbs, **names)
def test_code_fits_a_page(f):
    wide = [f"{where(f, c)}: {len(l)} columns: {l.strip()[:60]}..." for c in code(f) for l in src(c).splitlines() if len(l) > MAX_COLUMNS]
    assert not wide, "\n".join([f"{len(wide)} lines over {MAX_COLUMNS} columns", *wide])

@pytest.mark.parametrize("f", modules, **names)
def test_exported_cells_are_short(f):
    long = [f"{where(f, c)}: {len(body(c))} lines, starting {body(c)[0][:60]}" for c in code(f) if exported(c) and len(body(c)) > MAX_EXPORTED_LINES]
    assert not long, "\n".join([f"exported cells over {MAX_EXPORTED_LINES} lines (split classes with @patch)", *long])

@pytest.mark.parametrize("f", modules, **names)
def test_imports_of_the_module_stand_alone(f):
    for c in code(f):
        if not exported(c): continue
        kinds = {isinstance(t, (ast.Import, ast.ImportFrom)) for t in ast.parse(src(c)).body if not (isinstance(t, ast.Expr) and isinstance(t.value, ast.Constant))}
        assert len(kinds) < 2, f"{where(f, c)}: imports and other code in one exported cell"

@pytest.mark.parametrize("f", modules, **names)
def test_exported_definitions_are_documented(f):
    lacking = []
    for c in code(f):
        if not directives(c).keys() & {"export", "exports"}: continue
        for t in ast.parse(src(c)).body:
            if isinstance(t, (ast.FunctionDef, ast.ClassDef)) and not t.name.startswith("_") and not ast.get_docstring(t):
                lacking.append(f"{where(f, c)}: {t.name}")
    assert not lacking, "\n".join(["exported without a docstring", *lacking])

@pytest.mark.parametrize("f", modules, **names)
def test_library_code_has_no_bare_assert(f):
    found = [f"{where(f, c)}, line {t.lineno}" for c in code(f) if exported(c) for t in ast.walk(ast.parse(src(c))) if isinstance(t, ast.Assert)]
    assert not found, "\n".join(["raise an error that names the argument and the remedy instead of", *found])

# ------------------------------------------------------------------------------------------------------ the outputs
@pytest.mark.parametrize("f", nbs, **names)
def test_outputs_are_saved_and_without_errors(f):
    for c in code(f):
        outs = c["outputs"]
        assert not any(o["output_type"] == "error" for o in outs), f"{where(f, c)} holds an error"
        assert not any(o.get("name") == "stderr" for o in outs), f"{where(f, c)} holds a warning: {''.join(o['text'] for o in outs if o.get('name') == 'stderr' for o in [dict(text=''.join(o['text']))])[:200]}"
        draws = re.search(r"\b(plt\.(show|subplots|plot|imshow|figure)|show_images|show_batch|show_results|\.plot_\w+)\(", "\n".join(body(c)))
        if draws and not exported(c) and not skipped(c) and not re.search(r"^\s*def ", src(c), re.M) and "hide" not in directives(c) and "plt.close" not in src(c):
            assert any("image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {}) for o in outs), \
                f"{where(f, c)} draws but holds no picture: run `make execute NB=nbs/{f.name}`"

@pytest.mark.parametrize("f", nbs, **names)
def test_pictures_are_of_a_reasonable_size(f):
    size = f.stat().st_size
    assert size < 3_000_000, f"{f.name} has {size/1e6:.1f} MB"

# -------------------------------------------------------------------------------------------------- what it tells
_foreign = [(r"/(home|root|Users|work|mnt|opt|var/folders)/[\w.-]+", "an absolute path"),
            (r"\b[A-Z]:\\\\Users", "an absolute path"),
            (r"\bat 0x[0-9a-f]{6,}", "a memory address"),
            (r"/tmp/[\w.-]+", "a path of a temporary folder"),
            (r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}:\d+", "an address of a host")]

@pytest.mark.parametrize("f", nbs, **names)
def test_notebooks_name_no_machine(f):
    for c in cells(f):
        texts = [src(c)] + ["".join(o.get("text", [])) for o in c.get("outputs", [])] + \
                ["".join(v) for o in c.get("outputs", []) for k, v in o.get("data", {}).items() if k.startswith("text/") and not isinstance(v, dict)]
        for t in texts:
            for pattern, what in _foreign:
                m = re.search(pattern, t)
                assert not m, f"{where(f, c)} holds {what}: {m[0]!r}"

@pytest.mark.parametrize("f", nbs, **names)
def test_links_between_files_lead_somewhere(f):
    for c in prose(f):
        text = re.sub(r"```.*?```|`[^`]*`", "", src(c), flags=re.S)
        for url in re.findall(r"\]\(([^()\s]+)", text):
            if re.match(r"[a-z]+:|#", url): continue
            assert (f.parent/url.partition("#")[0]).exists(), f"{where(f, c)}: link to {url}, which is not there"

@pytest.mark.parametrize("f", nbs, **names)
def test_only_markdown_that_every_viewer_knows(f):
    for c in prose(f):
        m = re.search(r"^:::|^```\{|\{(py|ref|doc|numref|math):?\w*\}`|^\s*!!! ", src(c), re.M)
        assert not m, f"{where(f, c)}: {m[0]!r} is rendered by one tool only; use CommonMark, tables and $ $"

def test_only_the_build_script_looks_beside_the_repository():
    texts = [f for p in ("*.py", "*.ini", "*.toml", "*.md", "*.in", "Makefile", "docs/*.py", "docs/_templates/**/*", "tests/*.py", "nbs/*.ipynb", "ssl_notes/*.py", "nbs/results/*") for f in root.glob(p) if f.is_file()]
    beside = "../" + "shared"
    found = [f.relative_to(root).as_posix() for f in texts if beside in f.read_text(encoding="utf-8", errors="replace")]
    assert not found, f"{beside} is named in {found}"

def test_results_quoted_on_pages_say_how_they_were_measured():
    for f in sorted((root/"nbs"/"results").glob("*.json")):
        text = f.read_text(encoding="utf-8").lower()
        json.loads(text)
        assert '"stub": true' not in text, f"{f.name} holds placeholders, not measurements"
        lacking = [w for w in ("seed", "torch", "fastai", "cpu") if w not in text]
        assert not lacking, f"{f.name} does not tell {lacking}"

def test_requirements_keep_the_tools_out_of_the_library():
    import configparser
    p = configparser.ConfigParser(delimiters=["="], interpolation=None)
    p.read(root/"settings.ini", encoding="utf-8")
    names = {re.match(r"[\w.-]+", r)[0].lower() for r in p["DEFAULT"]["requirements"].split()}
    assert not names & {"nbdev", "sphinx", "furo", "myst-nb", "pytest", "playwright", "jupyterlab", "ipykernel", "nbclient"}
