# The commands: make help.
# Needs git, make and Python 3.11 or newer. Another Python than `python3`: make book PYTHON=python3.12

PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
READY := .venv/.ready
BENCH_READY := .venv-bench/.ready
CONFIGURED := _build/.configured
RECORDS := _build/ledger-records.jsonl

# Where this is set, every process compiles PyTorch anew, and takes three times as long to start.
unexport PYTHONDONTWRITEBYTECODE
# The last digits of a sum depend on the number of threads: one everywhere, and a process for each core.
export OMP_NUM_THREADS := 1
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
# The lock names all there is to install. Modules are compiled when they are first imported; most of
# what the packages hold never is.
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile

.PHONY: help book serve test unit notebooks site execute lint pages bench lock clean
.DEFAULT_GOAL := help

help:
	@echo "make book      install everything into .venv and build the site into _build/html"
	@echo "make serve     the same, and serve it on http://127.0.0.1:$(PORT) (PORT=...)"
	@echo "make test      everything that CI runs"
	@echo "make unit      the unit tests and doctests only; they record the ground-truth ledger"
	@echo "make notebooks run every notebook and compare its outputs with the stored ones"
	@echo "make site      build the site anew, and fail at a warning"
	@echo "make execute   run the notebooks whose code changed and store their outputs (ALL=1: all)"
	@echo "make lint      style and types only"
	@echo "make pages     the appendix pages that are made from records: run make unit before"
	@echo "make bench     time the package beside its peers (installs them into .venv-bench)"
	@echo "make lock      write requirements.lock from what .venv holds"
	@echo "make clean     delete what was built (.venv and .venv-bench stay; delete them to install anew)"

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "There is no '$(PYTHON)' here: install Python 3.11 or newer, or name yours: make book PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "The book needs Python 3.11 or newer, and '$(PYTHON)' is older: name another, for example: make book PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "This Python cannot make a virtual environment: install its venv module (Debian and Ubuntu: sudo apt-get install python3-venv)"; exit 1; }
	@echo "Installing the packages of requirements.lock into .venv; the first time this takes a few minutes."
	@$(PYTHON) -m venv .venv
	@$(PIP) --no-deps -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# A build writes the pages that changed; what concerns every page calls for a clean one.
$(CONFIGURED): _config.yml _toc.yml tools/site_config.py $(wildcard book/_static/*)
	@rm -rf _build/html _build/.doctrees
	@mkdir -p _build
	@touch $@

book: $(READY) $(CONFIGURED)
	@$(BIN)/jupyter-book build . -q > /dev/null
	@echo "The book is built: open $(CURDIR)/_build/html/index.html in a browser, or run: make serve"

serve: book
	@echo "Serving the book on http://127.0.0.1:$(PORT) (stop with Ctrl-C)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY)
	@rm -f $(RECORDS)
	$(PYTEST) --doctest-modules --ignore tests/site companion tests

# What runs on one core runs beside what has tests for two.
test: $(READY)
	@$(MAKE) --no-print-directory -j 2 lint unit
	$(BIN)/python tools/pages.py --check
	@$(MAKE) --no-print-directory -j 2 notebooks site
	$(BIN)/python -m pytest -n 2 tests/site

notebooks:
	$(PYTEST) --nbval --nbval-current-env --nbval-cell-timeout 300 --nbval-sanitize-with tests/book/sanitize.cfg book

site:
	@rm -rf _build/html _build/.doctrees
	$(BIN)/jupyter-book build . -q -W -n --keep-going

execute: $(READY)
	@$(BIN)/python tools/execute.py $(if $(ALL),--all)

pages: $(READY)
	@$(BIN)/python tools/pages.py

# The peers have an environment of their own: what the book is built with does not depend on them.
$(BENCH_READY): $(READY) requirements.lock requirements-bench.lock
	@$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install -q --disable-pip-version-check -r requirements.lock -r requirements-bench.lock
	@.venv-bench/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

bench: $(BENCH_READY)
	@for file in $(filter-out benchmarks/timing.py,$(wildcard benchmarks/*.py)); do .venv-bench/bin/python $$file || exit 1; done

# To change a version: .venv/bin/pip install -U NAME, then make lock test.
lock:
	@$(BIN)/python -m pip freeze --all --exclude pip --exclude setuptools --exclude-editable > requirements.new
	@{ echo "# Every version that the book is built and tested with; written by: make lock"; \
	   sed 's/+.*//' requirements.new; } > requirements.lock
	@rm requirements.new
	@touch $(READY)

clean:
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
