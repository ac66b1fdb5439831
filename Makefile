# Needs Python 3.10+ with its headers, g++ and make; everything else goes into $(VENV). See docs/building.md.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=

PY := $(VENV)/bin/python
CSRC := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help build test bench lint format wheel clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16
	@echo "Variables: PYTHON, VENV, PYTEST_ARGS (make test PYTEST_ARGS='-k causal'), BENCH_ARGS; for the build FLASHX_CUDA, CMAKE_ARGS, MAX_JOBS"

build: $(VENV)/.built  ## create .venv, build, install in place

# Passive: OpenMP threads that wait do not spin, which slows the tests several times over where other work wants the cores.
test: build  ## run the tests
	OMP_WAIT_POLICY=passive $(PY) -m pytest $(PYTEST_ARGS)

bench: build  ## run the benchmark on the CPU and show the table
	$(PY) -m flashx.bench $(BENCH_ARGS)

lint: $(VENV)/.deps  ## ruff, mypy and clang-format, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy flashx bench
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC_STYLED)

format: $(VENV)/.deps  ## format all sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC_STYLED)

wheel: $(VENV)/.deps  ## build sdist and wheel into dist/
	$(PY) -m build

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info flashx/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find flashx bench triton_impl tests -name __pycache__ -prune -exec rm -rf {} +

CSRC_STYLED = $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

# PATH: the cmake and ninja of the venv come before the system's.
$(VENV)/.built: $(VENV)/.deps pyproject.toml setup.py CMakeLists.txt $(CSRC)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.deps: requirements-dev.txt | $(VENV)/bin/pip
	$(PY) -m pip install -r requirements-dev.txt
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "flashx needs Python 3.10 or newer, not '$(PYTHON)'; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "This Python lacks the venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "This Python lacks its headers (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@command -v $(CXX) > /dev/null || \
	  { echo "No C++ compiler '$(CXX)' found (Debian, Ubuntu: apt install g++)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
