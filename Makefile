# Every target makes what it needs, once: `make test` and `make demo` work on a machine that has Python >= 3.11, g++ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt setup.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: build demo test lint format bench gpu gpu-build gpu-test gpu-sanitize gpu-bench wheel clean

build: $(VENV)/.built

$(VENV)/.packages: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.packages $(NATIVE) pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: build
	$(BIN)/python examples/digits.py

test: build
	$(BIN)/python -m pytest

lint: $(VENV)/.packages
	ruff check .
	ruff format --check .
	mypy --strict smpq_ext/typed.py smpq_ext/core.py smpq_ext/registry.py smpq_ext/games.py smpq_ext/budget.py smpq_ext/store.py \
	  smpq_ext/surrogate.py smpq_ext/stopping.py smpq_ext/estimators smpq_ext/solvers smpq_ext/report
	clang-format --dry-run --Werror $$(find csrc python_tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.packages
	ruff check --fix .
	ruff format .
	clang-format -i $$(find csrc python_tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-only --save-tables

# On a machine with a GPU, in an environment that has torch for it, nvcc, cmake, ninja, pybind11 and the packages of the tests: .venv where
# it is, else that of $(PYTHON). Nothing is fetched. Each part can be had by itself; `make -k gpu` goes on where one fails.
gpu: gpu-build gpu-test gpu-sanitize gpu-bench

gpu-build:
	$(PYTHON) -m pip install --no-build-isolation --no-deps --editable .
	$(PYTHON) -c "import torch; from smpq_ext import ops; assert ops.compiled and torch.cuda.is_available()"

gpu-test:
	SMPQ_TEST_DEVICE=cuda $(PYTHON) -m pytest

# Without torch's cache of memory, in which what is beyond a tensor is another one.
gpu-sanitize:
	for tool in memcheck racecheck; do \
	  SMPQ_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 $(PYTHON) -m pytest -q -x -p no:cacheprovider \
	    -k "not on_the_cpu" python_tests/test_ops.py python_tests/test_fused_ops.py || exit 1; \
	done

gpu-bench:
	$(PYTHON) -m benchmarks.gpu

# A wheel, and whether it works in an environment of its own.
wheel: $(VENV)/.packages
	rm -rf build/wheel build/wheel-venv
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet --disable-pip-version-check --constraint requirements-dev.txt build/wheel/*.whl
	cd build && wheel-venv/bin/smpq doctor
	cd build && wheel-venv/bin/python -W error -c "import torch, smpq_ext; from smpq_ext import ops; assert ops.compiled; \
	  assert smpq_ext.fake_quantize(torch.tensor([0.3]), 0.25, bits=2).item() == 0.25"

clean:
	rm -rf build $(VENV)/.built smpq_ext/_C*.so
