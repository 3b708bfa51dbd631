# make train and make test are each complete by themselves: they make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard kernels/*.cpp kernels/*.h)

.PHONY: train test check format docs linkcheck kernels dist clean

train: $(VENV)/.installed
	$(BIN)/python -m cpm_rcnn.train experiment=quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The pages, in build/docs; a broken link is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

# Asks the servers of all links to other sites; it needs access to them.
linkcheck: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -b linkcheck --quiet docs build/linkcheck

# Compiles the CPU kernels ahead of their first use.
kernels: $(VENV)/.installed
	$(BIN)/python -m cpm_rcnn.ops.compile_kernels

# An sdist and the wheel that is built from it.
dist: $(VENV)/.installed-test
	rm -rf dist
	$(BIN)/python -m build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
