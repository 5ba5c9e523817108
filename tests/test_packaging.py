"""The wheel: what is in it, and that it works in fresh environments, with the newest fastai and with the development set.

A fresh environment would download PyTorch again: 5 GB. So each environment here shares the files of PyTorch and the other
large, unchanging packages with the environment that runs the tests: an otherwise empty venv gets a folder of links to
exactly the packages that torch, torchvision, scikit-learn, matplotlib, pandas and spacy consist of and depend on, with
their metadata, so that pip counts them as installed. fastai, fastcore and all that is light come from the package index;
nbdev, the docs tools and this repository's own folder are not there, so a forgotten requirement is noticed.
"""
import ast, configparser, importlib.metadata as md, json, os, re, shutil, subprocess, sys, sysconfig, tarfile, zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
site = Path(sysconfig.get_path("purelib"))
shared = "torch torchvision scikit-learn matplotlib pandas spacy".split()
own = "fastai fastcore fasttransform fastprogress fastdownload plum-dispatch ssl-notes".split()   # never shared
ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
ini.read(root/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
# What "development" means for the library alone: the pins on fastai and what it stands on
pins = [r for r in cfg["dev_requirements"].split() if canonicalize_name(Requirement(r).name) in own]

@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "sdist and, made from it, the wheel; built in a copy, for setuptools leaves folders behind"
    src, out = tmp_path_factory.mktemp("src")/"repo", tmp_path_factory.mktemp("dist")
    shutil.copytree(root, src, ignore=shutil.ignore_patterns(".git", ".venv", "_build", "build", "*.egg-info", "__pycache__", "runs", "models", "results", "*.ipynb"))
    r = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, src], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-3000:]
    return out

@pytest.fixture(scope="module")
def wheel(dist): return next(dist.glob("*.whl"))

def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    lib = {n for n in names if n.startswith("ssl_notes/")}
    rest = {n for n in names} - lib
    info = f"ssl_notes-{cfg['version']}.dist-info"
    assert all(n.startswith(info + "/") for n in rest), sorted(rest)
    assert {f"{info}/licenses/LICENSE", f"{info}/METADATA", f"{info}/entry_points.txt"} <= rest
    assert lib == {f"ssl_notes/{f.name}" for f in (root/"ssl_notes").glob("*.py")}

def test_wheel_metadata(wheel):
    z = zipfile.ZipFile(wheel)
    info = f"ssl_notes-{cfg['version']}.dist-info"
    meta, entry = z.read(f"{info}/METADATA").decode(), z.read(f"{info}/entry_points.txt").decode()
    needs = [l.split(": ", 1)[1] for l in meta.splitlines() if l.startswith("Requires-Dist:")]
    plain = {canonicalize_name(Requirement(r).name) for r in needs if "extra ==" not in r}
    assert plain == {canonicalize_name(Requirement(r).name) for r in cfg["requirements"].split()}
    assert not plain & {"nbdev", "sphinx", "pytest", "jupyterlab"}
    assert f"Requires-Python: >={cfg['min_python']}" in meta and "License-Expression: Apache-2.0" in meta.replace("License: Apache-2.0", "License-Expression: Apache-2.0")
    assert "ssl_notes = ssl_notes.cli:main" in entry and "ssl_notes = ssl_notes._modidx:d" in entry
    assert "Apache License" in z.read(f"{info}/licenses/LICENSE").decode()

def test_versions_agree(wheel):
    init = (root/"ssl_notes"/"__init__.py").read_text(encoding="utf-8")
    assert re.search(r'__version__ = "([^"]+)"', init)[1] == cfg["version"]
    assert f"-{cfg['version']}-" in wheel.name
    log = (root/"CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[?(?:Unreleased|" + re.escape(cfg["version"]) + ")", log, re.M), "CHANGELOG.md does not speak of this version"

def test_sdist_builds_and_is_small(dist):
    f = next(dist.glob("*.tar.gz"))
    names = [n.partition("/")[2] for n in tarfile.open(f).getnames()]
    assert {"settings.ini", "setup.py", "LICENSE"} <= set(names)
    assert not [n for n in names if n.startswith(("nbs/", "docs/", "tests/"))]
    assert f.stat().st_size < 1_000_000

def test_library_imports_only_what_it_requires():
    "Every import of the package is in `requirements`, or comes with one of them; soundfile is asked for where a file needs it"
    known = {"torch", "torchvision", "fastai", "fastcore", "fasttransform", "fastprogress", "matplotlib", "sklearn", "numpy", "PIL", "pandas", "scipy",
             "plum", "ssl_notes", "soundfile"} | set(sys.stdlib_module_names)
    foreign = {}
    for f in (root/"ssl_notes").glob("*.py"):
        for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))):
            mods = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []
            for m in mods:
                if m.partition(".")[0] not in known: foreign.setdefault(f.name, set()).add(m)
    assert not foreign, foreign

# ----------------------------------------------------------------------------------------------- fresh environments
def closure(names):
    "Installed distributions among `names` and what they depend on, without `own`"
    found, todo = {}, list(names)
    while todo:
        n = canonicalize_name(todo.pop())
        if n in found or n in own: continue
        try: d = md.distribution(n)
        except md.PackageNotFoundError: continue
        found[n] = d
        for r in map(Requirement, d.requires or []):
            if r.marker is None or r.marker.evaluate({"extra": ""}): todo.append(r.name)
    return found

def share(folder):
    "Link the files of the shared packages into `folder`"
    folder.mkdir()
    for d in closure(shared).values():
        for top in {Path(f).parts[0] for f in d.files or [] if f.parts[0] not in ("..", "__pycache__")}:
            if not (folder/top).exists() and (site/top).exists(): (folder/top).symlink_to(site/top)

def environment(path, wheel, *requirements):
    "A venv with the wheel and `requirements`, on top of the shared packages; its python"
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    py = path/("Scripts" if os.name == "nt" else "bin")/"python"
    fresh = Path(subprocess.run([py, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip())
    share(path/"shared")
    (fresh/"shared.pth").write_text(str(path/"shared") + "\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    r = subprocess.run([py, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel), *requirements], capture_output=True, text=True, env=env)
    if r.returncode and re.search(r"Could not find a version|Connection|Network|resolve", r.stderr) and os.environ.get("CI") != "true" and "Failed to establish" in r.stderr:
        pytest.skip("no package index can be reached")
    assert r.returncode == 0, r.stdout[-1000:] + r.stderr[-3000:]
    return py

probe = """
import importlib, importlib.metadata as md, json, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import ssl_notes
out = dict(file=ssl_notes.__file__, modules=[], tools=[])
for m in pkgutil.iter_modules(ssl_notes.__path__):
    if m.name == "__main__": continue
    importlib.import_module(f"ssl_notes.{m.name}"); out["modules"].append(m.name)
for t in ("nbdev", "sphinx", "pytest", "nbclient", "execnb"):
    if importlib.util.find_spec(t): out["tools"].append(t)
out["versions"] = {n: md.version(n) for n in ("fastai", "fastcore", "torch")}
print("PROBE" + json.dumps(out))
"""

training = """
from ssl_notes.cli import METHODS, PRESETS, make_learner, method_settings
from ssl_notes.data import get_digits, mixed_dls
from ssl_notes.mean_teacher import MeanTeacherCallback
from ssl_notes.models import small_cnn
from fastai.basics import Learner, CrossEntropyLossFlat, accuracy
def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 2e-3)
    values = [float(v) for v in learn.recorder.values[-1]]
    assert sum(v != v for v in values) == 0, values
    return values
digits = get_digits()
for m in METHODS:
    own = method_settings(m, PRESETS["digits"], 12, 2)
    print("TRAINED", m, fit(make_learner(m, digits, labels=40, seed=0, steps=12, evals=2, bs=16, **own)))
dls = mixed_dls(digits, 100, bs=100)
cb = MeanTeacherCallback(rampup=5)
print("TRAINED", "mixed", fit(Learner(dls, small_cnn(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cb)))
"""

@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["newest", "development"])
def test_wheel_works_in_a_fresh_environment(which, wheel, tmp_path):
    py = environment(tmp_path/"env", wheel, *(pins if which == "development" else []))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONWARNINGS")} | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    run = lambda *a: subprocess.run([py, *a], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    r = run("-c", probe + training)
    assert r.returncode == 0, r.stdout[-1000:] + r.stderr[-4000:]
    out = json.loads(re.search(r"^PROBE(.*)$", r.stdout, re.M)[1])
    assert Path(out["file"]).is_relative_to(tmp_path), "the package was not imported from the wheel"
    assert set(out["modules"]) == {f.stem for f in (root/"ssl_notes").glob("*.py")} - {"__init__", "__main__"}
    assert not out["tools"], f"tools for development are there as well: {out['tools']}"
    v = {k: Version(x) for k, x in out["versions"].items()}
    if which == "newest": assert v["fastcore"].major >= 2 and v["fastai"] >= Version("2.8.12"), out["versions"]
    else: assert v["fastcore"].major < 2 and all(str(v[Requirement(p).name]) in Requirement(p).specifier for p in pins if Requirement(p).name in v), out["versions"]
    assert r.stdout.count("TRAINED") == 16, r.stdout[-1000:]   # fifteen methods, and mixed batches
    if "cli" in out["modules"]:
        r = run("-m", "ssl_notes", "--help")
        assert r.returncode == 0 and "train" in r.stdout, r.stdout[-1000:] + r.stderr[-4000:]
