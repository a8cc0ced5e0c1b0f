# Everything a fresh machine with Python 3.11 or newer needs; PYTHON chooses which.
PYTHON ?= python3
VENV := .venv
FLAX_VENV := .venv-flax
CLIENTS_VENV := .venv-clients
PACKAGES := "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test lint bench clean

# Installs jgptq and runs its demo.
demo: $(VENV)/installed
	$(VENV)/bin/jgptq demo

# Installs the test dependencies and runs every test. transformers 5 has no Flax classes, so the tests on those have
# an environment of their own; the libraries that read our checkpoints want versions of their own, and have another.
test: $(VENV)/installed-test $(FLAX_VENV)/installed $(CLIENTS_VENV)/installed lint
	$(FLAX_VENV)/bin/python -m pytest -q tests/flax_ports
	JGPTQ_CLIENTS=required $(CLIENTS_VENV)/bin/python -m pytest -q tests/clients
	$(VENV)/bin/python -m pytest -q -n 2 --ignore=tests/flax_ports --ignore=tests/clients

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

# It sees the packages of the tests' environment, and has of its own what that lacks: installing PyTorch and JAX again
# would take a minute more. Half of the rest is built from source, which an environment for each build would double.
# gptqmodel asks for a newer PyTorch and for much that only its other backends import.
$(CLIENTS_VENV)/installed: $(VENV)/installed-test
	$(PYTHON) -m venv $(CLIENTS_VENV)
	echo "import site; site.addsitedir('$$($(VENV)/bin/python -c $(PACKAGES))')" \
		> $$($(CLIENTS_VENV)/bin/python -c $(PACKAGES))/tests_environment.pth
	$(CLIENTS_VENV)/bin/python -m pip install --quiet "setuptools>=77"
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --no-compile --no-build-isolation -e .[clients]
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --no-compile --no-build-isolation --no-deps gptqmodel==7.7.0
	touch $@

clean:
	rm -rf $(VENV) $(FLAX_VENV) $(CLIENTS_VENV)
