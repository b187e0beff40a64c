# make demo and make test do everything on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PIP := $(BIN)/pip --quiet --disable-pip-version-check
# Where PyTorch comes from, if not from the package index: TORCH_INDEX=https://download.pytorch.org/whl/cpu is smallest.
TORCH_INDEX ?=

.PHONY: setup demo test lint pytest coverage lowest sanitize bench constraints docs docs-serve clean

KERNELS := CMakeLists.txt $(wildcard src/bitquilt/csrc/*)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -c constraints.txt $(addprefix --index-url ,$(TORCH_INDEX)) torch
	$(PIP) install -c constraints.txt -e '.[datasets,report,lm-eval,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/bitquilt demo --out demo-output

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/size_gates.py
	$(BIN)/actionlint .github/workflows/*.yml

PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

pytest: $(STAMP)
	$(PYTEST)

# Coverage makes the tests half as long again on Python 3.11 (14:05 instead of 9:38 minutes), so that `make test` leaves
# it out. From 3.12 on the interpreter counts lines by itself, at a fraction of the cost.
coverage: $(STAMP)
	env $$($(BIN)/python -c "import sys; print('COVERAGE_CORE=sysmon' * (sys.version_info >= (3, 12)))") \
	  $(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=90

test: lint pytest

# The tests once more with every dependency at the minimum that pyproject.toml declares.
LOWEST := build/lowest
lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tools/requirements.py lowest > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --no-deps -c $(LOWEST)/constraints.txt $(addprefix --index-url ,$(TORCH_INDEX)) torch
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/constraints.txt '.[datasets,report]' \
	  pytest pytest-xdist hypothesis html5lib ckwrap ml_dtypes
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -q -n 2 --dist worksteal

# The kernels once more under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the installed ones. Leaks
# are not looked for: the interpreter keeps its own. The library must be loaded before Python itself.
SANITIZED := build/sanitize
sanitize: $(STAMP)
	$(PIP) install -c constraints.txt nanobind cmake ninja
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DBITQUILT_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	  BITQUILT_KERNELS=$(abspath $(SANITIZED)) $(BIN)/python -m pytest -q -p tests.sanitized \
	  tests/ops/test_cpu_kernels.py tests/ops/test_matrix_units.py tests/ops/test_large_pages.py tests/layer/grids/test_kmeans.py tests/layer/test_native_sweep.py tests/serve/test_cpu_decoder.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

# Rewrite constraints.txt from pyproject.toml with the newest versions. UPGRADE= keeps every pin that still fits.
UPGRADE ?= --upgrade
UV := build/uv
constraints:
	test -x $(UV)/bin/uv || { $(PYTHON) -m venv $(UV) && $(UV)/bin/pip install --quiet uv; }
	printf '%s\n' cmake nanobind ninja | $(UV)/bin/uv pip compile pyproject.toml - $(UPGRADE) --quiet --all-extras \
	  --universal --python-version 3.11 --fork-strategy fewest --no-annotate --custom-compile-command 'make constraints' \
	  --output-file constraints.txt

# The site in build/site. Its environment needs neither PyTorch nor a compiler: the API pages are read from the source.
DOCS := build/docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

docs-serve: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -c constraints.txt $$($(PYTHON) tools/requirements.py extra docs)
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output benchmarks/output
