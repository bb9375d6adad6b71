# make demo: install, then train, score, sample and report two small models (no network needed after installation)
# make test: install, then run the default test suite
PYTHON ?= python3
VENV   := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
INSTALLED := $(VENV)/installed

.PHONY: demo test slow torture llama lint types benchmarks clean

demo: $(INSTALLED)
	$(BIN)/cleangpt demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# every fault at every place where it may happen, and a table of what was lost: docs/reliability.md
torture: $(INSTALLED)
	$(BIN)/python -m tests.faults

# llama.cpp, compiled here in some minutes: exported files are tested with it where it is installed
llama: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt llama-cpp-python

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

benchmarks: $(INSTALLED)
	$(BIN)/python -m benchmarks

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c "open('$(INSTALLED)', 'w').close()"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
