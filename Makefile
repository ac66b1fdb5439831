# Needs Python 3.10+ with its headers, g++ and make; everything else goes into $(VENV). See docs/building.md.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_STEPS ?= build test sanitize bench
GPU_ARGS ?=

PY := $(VENV)/bin/python
CSRC := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help build test bench cuda gpu lint format wheel clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16
	@echo "Variables: PYTHON, VENV, PYTEST_ARGS (make test PYTEST_ARGS='-k causal'), BENCH_ARGS;"
	@echo "  for the build FLASHX_CUDA (make build: 0), FLASHX_CUDA_ARCHS, FLASHX_EMULATOR (make build: 1), CMAKE_ARGS, MAX_JOBS;"
	@echo "  for make gpu GPU_STEPS ('$(GPU_STEPS)'), GPU_ARGS (bench.gpu's); see docs/building.md"

build: $(VENV)/.built  ## create .venv, build, install in place

# Passive: OpenMP threads that wait do not spin, which slows the tests several times over where other work wants the cores.
test: build  ## run the tests
	OMP_WAIT_POLICY=passive $(PY) -m pytest $(PYTEST_ARGS)

bench: build  ## run the benchmark on the CPU and show the table
	$(PY) -m flashx.bench $(BENCH_ARGS)

# One architecture whole, the others at the default head dims. Instances and flags are csrc/cuda/CMakeLists.txt's.
cuda: $(VENV)/.deps  ## compile the CUDA kernels (no GPU needed) and check their machine code
	$(call cuda_build,sm80,-DFLASHX_CUDA_ARCHS=80)
	$(call cuda_build,newer,"-DFLASHX_CUDA_ARCHS=90;100;120+PTX" "-DFLASHX_DIMS=64;128")
	$(PY) csrc/cuda/resources.py build/cuda

gpu:  ## on a machine with a GPU: build for it, test, sanitize, benchmark; needs no network
	PYTHON=$(PYTHON) GPU_STEPS="$(GPU_STEPS)" .ci/gpu $(GPU_ARGS)

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

define cuda_build
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -G Ninja -S csrc/cuda -B build/cuda/$(1) $(2)
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build build/cuda/$(1) $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
	$(PY) -c 'import ctypes; ctypes.CDLL("build/cuda/$(1)/libflashx_cuda_linked.so")'
endef

CSRC_STYLED = $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

# A development build has the emulator, which runs the CUDA kernels on the CPU, in place of the kernels for four GPU
# generations, which take many minutes to compile.
$(VENV)/.built: export FLASHX_CUDA ?= 0
$(VENV)/.built: export FLASHX_EMULATOR ?= 1
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
