# Two commands: `make demo` and `make test`. Both set themselves up in .venv.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
OUT ?= demo-output
TEXT ?= stdlib:
ITERS ?=

BIN := $(VENV)/bin
# The second environment of the tests: the first one with an older megatron-core in front of it.
CORE_0_12 := $(VENV)-core-0.12.1
# The third one: the first one with transformers 4 in front of it.
TRANSFORMERS_4 := $(VENV)-transformers-4
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)

.PHONY: help demo smollm2 test test-slow test-operators lint bench kernels clean setup setup-core-0.12 setup-transformers-4

help:
	@echo "make demo [TEXT=file-or-folder] [OUT=folder]   text -> ternary training -> Hugging Face -> a sample"
	@echo "make smollm2                                   SmolLM2 -> Megatron -> Hugging Face, ternary training"
	@echo "make test                                      tests, with megatron-core 0.16.1 and 0.12.1, transformers 5 and 4"
	@echo "make test-slow                                 the longer checks, with the same"
	@echo "make test-operators                            of them, those of the operators on all backends"
	@echo "make setup | setup-core-0.12 | setup-transformers-4"
	@echo "make kernels                                   environments; what the operator tests run"
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

# Their own packages come first on the path, then everything of the first environment. Without
# dependencies: megatron-core 0.12.1 declares many that it does not need.
$(CORE_0_12)/.built: requirements/megatron-0.12.1.txt $(VENV)/.built
	$(call overlay,$(CORE_0_12),$<)

$(TRANSFORMERS_4)/.built: requirements/transformers-4.txt $(VENV)/.built
	$(call overlay,$(TRANSFORMERS_4),$<)

define overlay
$(BIN)/python -m venv --clear --without-pip $(1)
$(BIN)/pip --python $(1)/bin/python install -qq --disable-pip-version-check --no-deps -r $(2)
@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
  > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first_environment.pth"
@touch $(1)/.built
endef

setup-core-0.12: $(CORE_0_12)/.built

setup-transformers-4: $(TRANSFORMERS_4)/.built

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" TEXT="$(TEXT)" OUT="$(OUT)" ITERS="$(ITERS)" bash launch/demo.sh

# A trained model through every format and back, and 30 steps of ternary training.
smollm2: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/smollm2.sh

# On all versions, each run to its end with its versions and its summary. The longer checks, with
# every layout and twenty crashes, are in test-slow.
test: SPEED := not slow
test-slow: SPEED := slow
test test-slow: setup setup-core-0.12 setup-transformers-4
	@status=0; \
	$(BIN)/python -m pytest -m "$(SPEED) and not npu and not gpu" --durations=5 $(PYTEST_ARGS) || status=1; \
	$(CORE_0_12)/bin/python -m pytest -m "$(SPEED) and both_versions" --durations=5 || status=1; \
	$(TRANSFORMERS_4)/bin/python -m pytest -m "$(SPEED) and both_transformers" --durations=5 || status=1; \
	exit $$status

# What the operator tests run besides this machine's own kernels: the CPU kernels with sanitizers and
# for 64-bit Arm (under qemu), the Ascend kernels on the host check. Tests also build them on demand.
kernels:
	$(MAKE) -C csrc/cpu/checks native asan neon
	$(MAKE) -C tests/ascend/host_check runner wrong semantics

test-operators: setup
	$(BIN)/python -m pytest -m "slow and not npu and not gpu" --durations=5 tests/ops tests/ascend

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/bitcpm bench ops
	$(BIN)/bitcpm bench train

clean:
	rm -rf $(VENV) $(CORE_0_12) $(TRANSFORMERS_4) build *.egg-info megatron_bitcpm/*.so demo-output
