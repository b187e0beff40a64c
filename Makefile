# make demo and make test do everything on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test lint sanitize check bench clean

KERNELS := CMakeLists.txt $(wildcard src/bitquilt/csrc/*)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[datasets,report,lm-eval,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/bitquilt demo --out demo-output

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90

# The kernels once more under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the installed ones. Leaks
# are not looked for: the interpreter keeps its own. The library must be loaded before Python itself.
SANITIZED := build/sanitize
sanitize: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt nanobind cmake ninja
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DBITQUILT_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	  BITQUILT_KERNELS=$(abspath $(SANITIZED)) $(BIN)/python -m pytest -q -p tests.sanitized \
	  tests/ops/test_kernels.py tests/ops/test_matrix_units.py tests/ops/test_large_pages.py tests/layer/grids/test_kmeans.py tests/serve/test_cpu_decoder.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist demo-output benchmarks/output
