# `make demo` and `make test` do all the set-up: a virtual environment .venv with the versions of constraints.txt.
# Another interpreter: make PYTHON=python3.12 test. Other arguments for pytest: make test ARGS="tests/test_keys.py -x".
# Tests run in two processes of one thread each; in this one: make test WORKERS=0.

PYTHON ?= python3
VENV := .venv
NEXT := .venv-next
NEXT_TENSORDICT := 0.15.3
ARGS ?=
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) $(ARGS)

BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check install
SOURCES := pyproject.toml constraints.txt
ORACLES := zennit pnpxai

.DEFAULT_GOAL := help
.PHONY: help demo test test-next lint format bench docs clean FORCE
.NOTPARALLEL:

help:
	@echo "make demo        explain and intervene on a trained agent, and write demo-report/index.html"
	@echo "make test        run the tests (make test-next: with tensordict $(NEXT_TENSORDICT), without torchrl)"
	@echo "make lint        ruff and mypy (make format: let ruff rewrite the files)"
	@echo "make bench       the benchmarks: ratios against hand-written PyTorch"
	@echo "make docs        build docs/_build/html"
	@echo "make clean       remove the environments and everything that was generated"

demo: $(VENV)/demo.done
	$(BIN)/tdconcepts demo $(ARGS)

test: $(VENV)/dev.done
	$(call PYTEST,$(VENV))

test-next: $(NEXT)/test.done
	$(call PYTEST,$(NEXT))

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.done
	$(BIN)/python -m pytest benchmarks --benchmark-quiet $(ARGS)

docs: $(VENV)/dev.done
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) $(NEXT) build dist docs/_build .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -rf demo-report
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The marks of what is installed lie inside the environment, so they go when it goes. An environment that can't run pip
# (an interrupted set-up, a Python that was removed) is made anew.
works = $(shell $(1)/bin/python -c "import pip" 2>/dev/null && echo yes)

define make_venv
@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
  echo "tdconcepts needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
@echo "Creating $(@D) (set up once; the packages take a minute or more to download)"
$(PYTHON) -m venv --clear $(@D)
@touch $@
endef

define install_torch
@echo "Installing into $(@D) ..."
$(@D)/bin/python $(PIP) -c $(1) torch hatchling editables
endef

$(VENV)/venv.done: $(if $(call works,$(VENV)),,FORCE)
	$(make_venv)

$(NEXT)/venv.done: $(if $(call works,$(NEXT)),,FORCE)
	$(make_venv)

$(VENV)/demo.done: $(VENV)/venv.done $(SOURCES)
	$(call install_torch,constraints.txt)
	$(BIN)/python $(PIP) --quiet -c constraints.txt --no-build-isolation -e ".[demo]"
	@touch $@

# The last two ask for torchvision and much else that the tests don't need: tests/oracles.py imports them all the same.
$(VENV)/dev.done: $(VENV)/venv.done $(SOURCES)
	$(call install_torch,constraints.txt)
	$(BIN)/python $(PIP) --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python $(PIP) --quiet -c constraints.txt --no-deps $(ORACLES)
	@touch $(VENV)/demo.done $@

$(NEXT)/test.done: $(NEXT)/venv.done $(SOURCES) Makefile
	grep -v "^tensordict==" constraints.txt > $(NEXT)/constraints.txt
	echo "tensordict==$(NEXT_TENSORDICT)" >> $(NEXT)/constraints.txt
	$(call install_torch,$(NEXT)/constraints.txt)
	$(NEXT)/bin/python $(PIP) --quiet -c $(NEXT)/constraints.txt --no-build-isolation -e ".[test]"
	$(NEXT)/bin/python $(PIP) --quiet -c $(NEXT)/constraints.txt --no-deps $(ORACLES)
	@touch $@
