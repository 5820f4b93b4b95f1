# Two commands: `make demo` and `make test`. Both set themselves up in .venv.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
TEXT ?= stdlib:
ITERS ?=

BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: help demo test lint bench clean setup

help:
	@echo "make demo [TEXT=file-or-folder] [OUT=folder]   text -> ternary training -> Hugging Face -> speech"
	@echo "make test                                      all tests"
	@echo "make lint | bench | clean"

# The environment: the pinned lock, then this package with its C++ operator.
$(VENV)/.locked: requirements/lock.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] == (3, 11) else f"PYTHON=python{v[0]}.{v[1]}: the lock is for Python 3.11. Use make PYTHON=python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check "$$(grep '^torch==' requirements/lock.txt)"
	$(BIN)/pip install -qq --disable-pip-version-check -r requirements/lock.txt
	@touch $@

$(VENV)/.built: $(VENV)/.locked setup.py pyproject.toml $(SOURCES)
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/.built

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" TEXT="$(TEXT)" OUT="$(OUT)" ITERS="$(ITERS)" bash launch/demo.sh

test: setup
	$(BIN)/python -m pytest -m "not npu and not gpu" --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/bitcpm bench ops
	$(BIN)/bitcpm bench train

clean:
	rm -rf $(VENV) build *.egg-info megatron_bitcpm/*.so demo-output
