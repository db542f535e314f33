# Needs Linux, Python 3.11 or newer, make and git; everything else is installed into .venv.
# Tried on x86-64 with Python 3.11; README.md says what other systems get.
# Paths are relative, and tools run as `python -m`, so that a folder name with a space works.

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
# The second one shows exercises, figures and citations in JupyterLab as the page does.
JUPYTERLAB := jupyterlab==4.5.11 jupyterlab-myst==2.7.0
# What compiles no kernel, builds no page and opens no browser.
QUICK := $(addprefix tests/test_,axes.py statistics.py reference.py imports.py nn.py)
SAY := @printf '\n== %s\n'

# One thread: on the small tensors of this book more threads are slower, and change the last bits.
export OMP_NUM_THREADS := 1
export NUMBA_NUM_THREADS := 1
export PYTHONHASHSEED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Inside a notebook the inline backend must be the one that the kernel chooses.
unexport MPLBACKEND

# The package is installed from this folder: a folder that has moved installs it anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help book offline style test quick lab notebooks bench audit linkcheck clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, but {sys.executable} is Python {v}. Name another: make PYTHON=python3.12 ...")'
	$(SAY) "Installing into .venv (a few minutes the first time)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PY) -m pip install --progress-bar on -r requirements.txt
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

book: $(STAMP)  ## build the book as HTML, warnings are errors
	$(SAY) "Building the book"
	@rm -rf _build
	@$(PY) -c 'from jupyter_book.cli.main import main; main()' build . -W -n --keep-going
	@$(PY) -m tools.lean _build/html
	$(SAY) "Open $(CURDIR)/_build/html/index.html"

offline: book  ## make one zip of the book that needs no network, and an EPUB
	$(SAY) "Building the EPUB"
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || date +%s) $(PY) -c 'from jupyter_book.cli.main import main; main()' build . -W -n --keep-going --builder custom --custom-builder epub
	@$(PY) tools/offline.py

style: $(STAMP)  ## check style and types alone
	$(SAY) "Style"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	$(SAY) "Types"
	@$(PY) -m mypy

# SELECT='-m "not pages"' leaves out what needs the built book or a browser.
test: style  ## check style and types, run every test and every notebook
	$(SAY) "Tests, and every notebook against its stored outputs"
	@$(PY) -m pytest -n 2 --dist loadfile --durations 20 --nbval $(SELECT) tests book
	$(SAY) "The GPU kernels in Triton's interpreter"
	@if $(PY) -c 'from importlib.util import find_spec as f; exit(not f("triton"))'; then \
	  TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist worksteal --durations 20 tests/gpu; \
	else echo "Not run: triton has no package for this platform"; fi

quick: style  ## check style, types and the core: no browser, no kernels, under a minute
	$(SAY) "Tests of the core"
	@$(PY) -m pytest -q -n 2 $(QUICK)

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@$(PY) -c 'import jupyterlab, jupyterlab_myst' 2>/dev/null || $(PY) -m pip install -c requirements.txt $(JUPYTERLAB)
	@$(PY) -m jupyterlab book

notebooks: $(STAMP)  ## execute every notebook and store the outputs that differ
	@$(PY) tools/run_notebooks.py

bench: $(STAMP)  ## measure the CPU kernels against PyTorch, on a quiet machine
	$(SAY) "Measuring; this writes book/data/cpu.csv"
	@$(PY) benchmarks/cpu.py

audit: book  ## measure the pages with Lighthouse, on a quiet machine with Chromium
	$(SAY) "Measuring; this writes the table in CONTRIBUTING.md (ten minutes)"
	@$(PY) tools/audit.py

linkcheck: $(STAMP)  ## check that the book's outside links answer
	$(SAY) "Checking links"
	@rm -rf _build/linkcheck
	@$(PY) -c 'from jupyter_book.cli.main import main; main()' build . --builder linkcheck

clean:  ## remove what was built (.venv too)
	rm -rf _build .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find book bnlib tests tools -name __pycache__ -prune -exec rm -rf {} +
