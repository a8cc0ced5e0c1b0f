# Everything a fresh machine with Python 3.11 or newer needs; PYTHON chooses which.
PYTHON ?= python3
VENV := .venv
FLAX_VENV := .venv-flax
CLIENTS_VENV := .venv-clients
AOT_VENV := .venv-aot
PACKAGES := "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test kernels lint bench clean

# Installs jgptq and runs its demo.
demo: $(VENV)/installed
	$(VENV)/bin/jgptq demo

# Installs the test dependencies and runs every test. transformers 5 has no Flax classes, so the tests on those have
# an environment of their own; the libraries that read our checkpoints want versions of their own, and have another.
test: $(VENV)/installed-test $(FLAX_VENV)/installed $(CLIENTS_VENV)/installed lint kernels
	$(FLAX_VENV)/bin/python -m pytest -q tests/flax_ports
	JGPTQ_CLIENTS=required $(CLIENTS_VENV)/bin/python -m pytest -q tests/clients
	$(VENV)/bin/python -m pytest -q -n 2 --ignore=tests/flax_ports --ignore=tests/clients

# Compiles the kernels for a GPU and for TPUs that are not there, and sees that the benchmark of GPUs runs. The compilers
# come for Linux on x86-64 alone.
ifeq ($(shell uname -sm),Linux x86_64)
kernels: $(AOT_VENV)/installed
	$(AOT_VENV)/bin/python benchmarks/sass.py --few --output $(AOT_VENV)/sass.json
	$(AOT_VENV)/bin/python benchmarks/tpu.py --few --output $(AOT_VENV)/tpu.json
	$(VENV)/bin/python benchmarks/gpu.py --tiny --output $(AOT_VENV)/gpu.json
else
kernels: $(VENV)/installed-test
	@echo "The kernels are not compiled here: their compilers come for Linux on x86-64, and this is $$(uname -sm)."
	$(VENV)/bin/python benchmarks/gpu.py --tiny --output $(VENV)/gpu.json
endif

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

# Two compilers, without the libraries that a GPU's or a TPU's machine has: 350 MB. They belong to one version of JAX,
# which is not everywhere that of the tests.
$(AOT_VENV)/installed: $(VENV)/installed-test
	$(PYTHON) -m venv $(AOT_VENV)
	echo "import site; site.addsitedir('$$($(VENV)/bin/python -c $(PACKAGES))')" \
		> $$($(AOT_VENV)/bin/python -c $(PACKAGES))/tests_environment.pth
	$(AOT_VENV)/bin/python -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 absl-py
	$(AOT_VENV)/bin/python -m pip install --quiet --no-compile --no-deps \
		jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 libtpu==0.0.42.1
	touch $@

clean:
	rm -rf $(VENV) $(FLAX_VENV) $(CLIENTS_VENV) $(AOT_VENV)
