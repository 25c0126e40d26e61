# One command per job; each sets up `.venv` first. Needs a Python 3.11 or later and a C++ compiler, nothing else:
# cmake and ninja come from the package index.
#
#   make demo PYTHON=python3.12       another interpreter for the environment
#   make test TORCH='torch==2.11.0'   another torch (the extension is rebuilt against it after `make clean-venv`)
#   make test ARGS='-k record -x'     arguments for pytest
#   make demo ARGS='--out out/second'  arguments for the demo

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
# A CPU build by default where the index offers the choice, e.g.
#   TORCH_INDEX=--index-url=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV ?= .venv
JOBS ?= $(shell nproc)
ARGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.stamp
NATIVE := $(wildcard setup.py CMakeLists.txt) $(shell find csrc proto -type f 2>/dev/null)
CLANG_FILES := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# The environment's tools (cmake, ninja, protoc, clang-format) come before those of the machine.
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help venv demo test bench accuracy-quick lint tidy format sanitize sanitize-cuda proto clean clean-venv

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(STAMP)/venv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMP) && touch $@

# torch first and by itself: everything else is then resolved, and the extension compiled, against it.
$(STAMP)/torch: $(STAMP)/venv
	$(PIP) install $(TORCH_INDEX) '$(TORCH)'
	touch $@

# What the build needs is listed once, in pyproject.toml.
$(STAMP)/build-deps: pyproject.toml $(STAMP)/torch
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $@.txt
	$(PIP) install -r $@.txt
	touch $@

# No other package may exchange the torch that was chosen. timm comes alone: torchvision, which it asks for, would, and
# its wheel does not load beside a CPU build.
$(STAMP)/installed: pyproject.toml $(NATIVE) $(STAMP)/build-deps
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(STAMP)/torch.txt
	$(PIP) install --no-build-isolation -c $(STAMP)/torch.txt -e '.[dev,demo]'
	$(PIP) install --no-deps 'timm>=1.0'
	touch $@

venv: $(STAMP)/installed ## the environment with amct_ext built into it (editable)

# Waiting threads sleep instead of spinning: hardly slower alone, several times faster on a machine shared with others.
demo test: export OMP_WAIT_POLICY ?= PASSIVE

demo: venv ## compress, train, lose the process, restore, go on, export - on real data
	$(BIN)/python examples/digits/demo.py $(ARGS)

# One process per core, each with one thread; a file's tests stay together, for they share what was set up once. The order
# of files is that of tests/conftest.py; xdist by itself would leave those with few and long tests to the end.
test: export OMP_NUM_THREADS ?= 1
test: venv ## all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: venv ## fused against eager: every op, then one whole training step
	$(BIN)/python -m benchmarks.ops.report --write $(ARGS)
	$(BIN)/python -m benchmarks.step.bench_retrain_step

# What it makes is kept in build/accuracy, so that a second run is quicker.
accuracy-quick: export OMP_WAIT_POLICY ?= PASSIVE
accuracy-quick: venv ## accuracy after compression on two small tasks, at most three minutes
	$(BIN)/python -m benchmarks.accuracy.quick --cache build/accuracy $(ARGS)

lint: venv ## ruff, clang-format, mypy, who imports whom, generated files up to date; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CLANG_FILES),$(BIN)/clang-format --dry-run --Werror $(CLANG_FILES))
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/generate_proto.py --check

tidy: venv ## clang-tidy over the C++ and CUDA sources
	tools/tidy.sh $(ARGS)

format: venv ## rewrite the sources in the house style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CLANG_FILES),$(BIN)/clang-format -i $(CLANG_FILES))

sanitize: venv ## the op tests under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize.sh $(ARGS)

sanitize-cuda: venv ## the op tests on the GPU under compute-sanitizer: memcheck, racecheck, initcheck
	tools/sanitize_cuda.sh $(ARGS)

proto: venv ## compile proto/ after a change of a .proto file; the result is carried in git
	$(BIN)/python tools/generate_proto.py

clean: ## build products and outputs; the environment stays
	rm -rf build out dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis $(STAMP)/installed
	find amct_ext -name '*.so' -delete 2>/dev/null || true

clean-venv: clean ## the environment too
	rm -rf $(VENV)
