# Each target makes .venv, installs the pinned, tested versions and builds the extension (editable) when needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BUILT  := $(VENV)/.built
# Processes that run the tests side by side. Each has torch's threads, and each test of the kernels some 0.5 GB.
JOBS   ?= 2
NATIVE := $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint format bench gpu figures wheel-test kernels-check sanitize aarch64 tune clean help
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): .ci/requirements.txt .ci/interop-requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -r .ci/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-compile -r .ci/interop-requirements.txt
	@touch $@

$(BUILT): $(READY) setup.py pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

demo: $(BUILT)  ## restore photographs from 25 % of their measurements; pictures in demo-output/
	$(BIN)/lorun-fast demo

test: $(BUILT)  ## the whole test suite, then the wheel from outside the tree
	$(BIN)/python -m pytest -n $(JOBS)
	$(MAKE) --no-print-directory wheel-test

wheel-test: $(BUILT)  ## pack the sources, build a wheel, install it elsewhere, use it from outside the tree
	bash .ci/wheel-test $(BIN)/python

lint: $(BUILT)  ## ruff and clang-format, no changes made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

format: $(BUILT)  ## the same, changing files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

kernels-check: $(BUILT)  ## compile every Triton kernel for sm_80, sm_90 and sm_100: registers, spills, shared memory
	env -u TRITON_INTERPRET $(BIN)/python -m lorun_fast.kernels.check

sanitize: $(READY)  ## the C++ and CUDA kernels on this CPU under GCC's sanitizers, in a copy of the tree: FOLDER=DIR keeps it
	bash .ci/sanitize $(BIN)/python $(FOLDER)

aarch64:  ## the C++ kernels' tests on an emulated 64-bit ARM processor, from FOLDER=DIR; needs root on Debian or Ubuntu
	bash .ci/aarch64 $(FOLDER)

tune: $(BUILT)  ## search kernel tiles on this GPU, on request: PROBLEMS="'forward 64' ..." OUT=FILE, OFFLINE=90 without one
	env -u TRITON_INTERPRET $(BIN)/python -m lorun_fast.kernels.tune $(PROBLEMS) $(if $(OUT),--out $(OUT)) $(if $(OFFLINE),--offline $(OFFLINE))

bench: $(BUILT)  ## every benchmark on this CPU, with tables and plots in benchmarks/results/
	$(BIN)/python -m benchmarks --plot

gpu:  ## build, test and benchmark on a CUDA machine, without network, in ten minutes
	bash benchmarks/gpu.sh

figures: $(BUILT)  ## the pictures of the README
	$(BIN)/python docs/make_figures.py

clean:  ## remove what was built
	rm -rf $(VENV) build dist *.egg-info lorun_fast/_C*.so
