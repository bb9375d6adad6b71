# make demo: install, then train, score, sample and report two small models (no network needed after installation)
# make test: install, then run the default tests, over all cores
PYTHON ?= python3
VENV   := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
INSTALLED := $(VENV)/installed
# Processes that run tests: as many as there are cores, or make test WORKERS=4
WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test slow all-tests slowest torture llama lint types benchmarks clean

demo: $(INSTALLED)
	$(BIN)/cleangpt demo

test: $(INSTALLED)
	$(PYTEST)

slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not torture'

# the default tests and the slow ones, each once, from one pool of processes; what .ci/run runs. Hypothesis tries each
# property on 100 examples, for the 25 of `make test`
slow all-tests slowest torture: export HYPOTHESIS_PROFILE = thorough
all-tests: $(INSTALLED)
	$(PYTEST) -m 'not torture'

# the same, and writes the table of the slowest tests into CONTRIBUTING.md
slowest: $(INSTALLED)
	$(PYTEST) -m 'not torture' --slowest=CONTRIBUTING.md

# every fault at every place where it can happen, with a table of what was lost (docs/reliability.md), and the
# repetitions of tests that .ci/run leaves out
torture: $(INSTALLED)
	$(BIN)/python -m tests.faults
	$(PYTEST) -m torture

# compiles llama.cpp, for some minutes, and compares what it computes from exported files with what we compute
llama: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt llama-cpp-python
	$(PYTEST) -m torture tests/interchange/test_gguf.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

benchmarks: $(INSTALLED)
	$(BIN)/python -m benchmarks

# pip would compile the packages on one core. Left to the first import, some would fail in the tests, where warnings of
# the compiler are errors. Their own tests, and most models of Transformers, are never imported
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -W ignore -c "import compileall, re, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, \
	    rx=re.compile('/tests/|transformers/models/'), workers=0)"
	$(BIN)/python -c "open('$(INSTALLED)', 'w').close()"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
