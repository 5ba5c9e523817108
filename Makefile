# Needs python3 (3.10 or newer) and make. Everything is installed into .venv and nowhere else.
#
#   make demo      install the library, train with 40 labels with and without MixMatch, show table and picture
#   make test      every check: package, notebooks, pages, tests
#   make docs      build the site and say which file to open
#   make notebook  JupyterLab
#   make execute   run all notebooks and save their outputs
#   make clean     remove what was built (not .venv: `make distclean`)
#
# Another Python: make demo PYTHON=python3.12      Options for pip: make demo PIP="--extra-index-url URL"

PYTHON ?= python3
PIP    ?=
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python
# Notebooks and tests are many small programs: one thread each, as many programs as cores.
ONE    := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONWARNINGS=ignore::FutureWarning
STATE  := docs/_build/tree.json

.DEFAULT_GOAL := help
.PHONY: help demo install dev test sync style docs site notebooks pytest notebook execute readme export clean distclean

help:
	@sed -n 's/^#   make/  make/p' Makefile

# ------------------------------------------------------------------ installation, once per change of settings.ini
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "$(PYTHON) is Python %d.%d; 3.10 or newer is needed (make PYTHON=...)" % sys.version_info[:2])'
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python's venv module is missing (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

$(VENV)/.lib: settings.ini setup.py | $(BIN)/python
	@echo "== installing the library (the first time PyTorch is downloaded, which takes a while)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP) -e .
	@touch $@

$(VENV)/.dev: settings.ini setup.py | $(BIN)/python
	@echo "== installing the library with the tools for notebooks, tests and pages"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP) -e ".[dev]"
	@touch $(VENV)/.lib $@

$(VENV)/.lab: $(VENV)/.dev
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP) jupyterlab
	@touch $@

install: $(VENV)/.lib
dev: $(VENV)/.dev

# ------------------------------------------------------------------------------------------------------------ use
demo: $(VENV)/.lib
	@$(RUN) -W ignore::FutureWarning -m ssl_notes demo $(ARGS)

notebook: $(VENV)/.lab
	@$(BIN)/jupyter lab --notebook-dir=nbs

docs: $(VENV)/.dev
	@$(RUN) -W ignore docs/build.py

execute: $(VENV)/.dev
	@$(RUN) docs/execute.py $(NB)

export: $(VENV)/.dev
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(RUN) docs/readme.py

readme: $(VENV)/.dev
	@$(RUN) docs/readme.py

# --------------------------------------------------------------------------------------------- checks, quick first
test: $(VENV)/.dev
	@rm -f $(STATE); $(RUN) docs/check.py tree $(STATE)
	@start=$$(date +%s); \
	 for step in sync style site notebooks pytest; do \
	   t=$$(date +%s); $(MAKE) --no-print-directory -s $$step || { echo; echo "== make $$step FAILED"; exit 1; }; \
	   echo "   ($$(( $$(date +%s) - t )) s)"; \
	 done; \
	 $(RUN) docs/check.py tree $(STATE) || exit 1; \
	 echo; echo "== all checks passed in $$(( $$(date +%s) - start )) s"

sync: $(VENV)/.dev
	@echo; echo "== 1/5 package, notebooks and README in step (make sync)"
	@$(RUN) docs/check.py sync

style: $(VENV)/.dev
	@echo; echo "== 2/5 how the notebooks are written (make style)"
	@$(ONE) $(RUN) -m pytest -q tests/test_repo.py

site: $(VENV)/.dev
	@echo; echo "== 3/5 the site, warnings are errors (make site)"
	@$(ONE) $(RUN) -W ignore docs/build.py --strict

notebooks: $(VENV)/.dev
	@echo; echo "== 4/5 every notebook, cell by cell (make notebooks)"
	@$(ONE) $(BIN)/nbdev_test --timing --do_print

pytest: $(VENV)/.dev
	@echo; echo "== 5/5 tests (make pytest)"
	@$(ONE) $(RUN) -m pytest -q --durations=8 -n logical --maxprocesses 4 --dist loadfile --ignore=tests/test_repo.py $(ARGS)

# --------------------------------------------------------------------------------------------------------- tidying
clean:
	@rm -rf docs/_build build dist *.egg-info .pytest_cache .hypothesis nbs/.ipynb_checkpoints nbs/.last_checked
	@find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
