# `make run` measures, `make test` proves. Both make .venv first, pinned by constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: run test lint types unit bench gpu check docs publish install install-dev clean

run: install
	$(BIN)/ctxbench run --methods all --seq 1k..128k

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard implementations/*/__init__.py) | $(BIN)/python
	$(PIP) install -q setuptools
	$(PIP) install -q --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q --no-build-isolation -e ".[test,dev,nvidia]"
	@touch $@

test: lint types unit

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked on the installed wheel: what users get, with the mapped folders in place.
types: install-dev
	rm -rf build/types && mkdir -p build/types
	$(PIP) wheel -q --no-deps --no-build-isolation -w build/types .
	$(PYTHON) -c "import zipfile, glob; zipfile.ZipFile(glob.glob('build/types/*.whl')[0]).extractall('build/types/site')"
	cd build/types/site && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p ctxbench

# One test process a core, one thread each: what a test measures of time it measures in its own children.
unit: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

# Ratios side by side in one run; never part of the tests.
bench: install-dev
	$(BIN)/python -m ctxbench.suites.benchmarks

# On a machine with a GPU: tests, ratios and the main job, under nine minutes, going on where it was cut short. Exit 5 without one.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m ctxbench.suites.gpu --out $(or $(OUT),runs/gpu)

# make publish RUN=runs/... NAME=cpu: rows, header and static page of a finished run, and the list of all of them.
publish: install
	$(BIN)/python -m ctxbench.reports.publish $(RUN) reports/published/$(NAME)

# The method table of the README and docs/methods.md; a test fails when they are not what the registry says.
docs: install
	$(BIN)/python docs/generate.py

check: install
	$(BIN)/ctxbench check all

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
