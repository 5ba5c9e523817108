"""Run notebooks in a fresh kernel and save their outputs:  python docs/execute.py [--flags "slow"] [NOTEBOOK ...]

Cells marked `#| eval: false`, or with a flag of settings.ini's `tst_flags` that is not given, are left as they are, with
the outputs they have. The notebooks are cleaned as `nbdev_clean` does, so that a second run of the same code gives the same file.
(`nbdev_test` runs the same cells and saves nothing.)
"""
import argparse, os, sys, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def skipped(path, flags):
    "Ids of the code cells that are not to be run, read as nbdev reads them"
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    marks = set(get_config(path=root).tst_flags.split()) - set(flags)
    def skip(c):
        d = c.directives_
        return d.get("eval:", [""])[0].lower() == "false" or bool(marks & d.keys()) or "nbdev_export(" in c.source
    return {c.id for c in NBProcessor(path, rm_directives=False).nb.cells if c.cell_type == "code" and skip(c)}

def execute(path, flags, timeout):
    "Run the notebook, save and clean it; True if no cell failed"
    import nbformat
    from execnb.nbio import read_nb, write_nb
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbdev.clean import clean_nb
    nb, skip, slow, start = nbformat.read(path, 4), skipped(path, flags), [], time.time()
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", extra_arguments=["--IPKernelApp.log_level=40"], resources={"metadata": {"path": str(path.parent)}})
    failed = None
    try:
        with client.setup_kernel():
            for i, cell in enumerate(nb.cells):
                if cell.cell_type != "code" or cell.id in skip: continue
                t = time.time()
                client.execute_cell(cell, i)
                slow.append((time.time() - t, i))
    except CellExecutionError as e: failed = e
    if failed:
        print(f"FAILED {path.name}, cell {i} (the file is as it was)\n{failed}", file=sys.stderr)
        return False
    for c in nb.cells: c.get("metadata", {}).pop("execution", None)
    tmp = path.with_suffix(".ipynb.part")
    nbformat.write(nb, tmp)
    clean = read_nb(tmp)
    clean_nb(clean)
    write_nb(clean, tmp)
    os.replace(tmp, path)
    t, i = max(slow, default=(0, 0))
    print(f"{path.name}: {time.time()-start:.0f} s, {len(slow)} cells run, {len(skip)} left; slowest: cell {i} with {t:.0f} s", flush=True)
    return True

def main():
    p = argparse.ArgumentParser(description="Run notebooks and save their outputs")
    p.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    p.add_argument("--flags", default="", help="flags whose cells are run as well, e.g. 'slow'")
    p.add_argument("--timeout", type=int, default=1800, help="seconds for one cell")
    a = p.parse_args()
    # fastai 2.8 makes torch warn at import, with the path of this machine: not for the pages
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning:torch.jit._script"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    files = [f.resolve() for f in a.notebooks] or sorted(f for f in (root/"nbs").glob("*.ipynb") if f.name[0] not in "._")
    ok = [execute(f, a.flags.split(), a.timeout) for f in files]
    sys.exit(0 if all(ok) else 1)

if __name__ == "__main__": main()
