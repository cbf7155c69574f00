# Two commands a newcomer needs: `make demo` and `make test`. Both build .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test fuzz test-torch frontier check format lint types clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	# torch first and pinned: asked for by another package, pip would take the newest build with gigabytes of CUDA
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,dev,demo,bench]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/memplan demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 tests

# Thousands of random models, other ones on every run
fuzz: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 tests/fuzz --hypothesis-profile nightly

# Memory against time, every model and contender: days; an interrupted run goes on where it was. QUICK=--quick takes minutes.
QUICK ?=
frontier: $(VENV)/.ready
	$(BIN)/python benchmarks/frontier.py $(QUICK)

# The tests of what meets torch, under another one, in an environment of its own: `make test-torch TORCH=2.11.0`. Set PIP_INDEX_URL
# to an index of CPU builds: on Linux the default one has those with CUDA.
TORCH ?= 2.11.0
OTHER = .venv-torch-$(TORCH)
test-torch:
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(OTHER)/bin/pip install --quiet --no-build-isolation --editable ".[test]"
	# last, with its own Triton: the one pinned for the tests would pull another torch
	$(OTHER)/bin/pip install --quiet torch==$(TORCH)
	$(OTHER)/bin/python -m pytest -n 2 tests/backend tests/step tests/runtime tests/passes tests/cost tests/report tests/fuzz

check: format lint types test

format: $(VENV)/.ready
	$(BIN)/ruff format --check .

lint: $(VENV)/.ready
	$(BIN)/ruff check .

types: $(VENV)/.ready
	$(BIN)/mypy memplan passes solvers codegen

clean:
	rm -rf $(VENV) build *.egg-info
