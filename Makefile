# Everything a fresh machine with Python 3.11 or newer needs; PYTHON chooses which.
PYTHON ?= python3
VENV := .venv
FLAX_VENV := .venv-flax

.PHONY: demo test lint bench clean

# Installs jgptq and runs its demo.
demo: $(VENV)/installed
	$(VENV)/bin/jgptq demo

# Installs the test dependencies and runs every test. transformers 5 has no Flax classes, so the tests on those have
# an environment of their own.
test: $(VENV)/installed-test $(FLAX_VENV)/installed lint
	$(FLAX_VENV)/bin/python -m pytest -q tests/flax_ports
	$(VENV)/bin/python -m pytest -q -n 2 --ignore=tests/flax_ports

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check jgptq tests benchmarks examples
	$(VENV)/bin/ruff format --check jgptq tests benchmarks examples

# The figures that need no GPU; results go to benchmarks/results.
bench: $(VENV)/installed-test
	$(VENV)/bin/python benchmarks/solver.py
	$(VENV)/bin/python benchmarks/accuracy.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

# PyTorch first and alone: the version named is then the one that stays.
$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet -e .[test]
	touch $@

$(FLAX_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(FLAX_VENV)
	$(FLAX_VENV)/bin/python -m pip install --quiet -e .[flax-ports]
	touch $@

clean:
	rm -rf $(VENV) $(FLAX_VENV)
