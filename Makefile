# Everything a newcomer types. Each target works alone on a fresh clone: it makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The suite's tolerances and the demo's comparison are for the CPU, where PyTorch runs too. `make bench` takes what JAX finds.
TEST_ENV := JAX_PLATFORMS=cpu
TORCH ?= torch==2.13.0

.PHONY: setup demo test test-slow lint format bench clean

setup: $(VENV)/.installed

# The oracle, PyTorch, comes first and as a CPU build, so that nothing later pulls the CUDA one.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHON=$(BIN)/python sh tools/install_torch.sh "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[test,bench,train,eval,notebook]'
	touch $@

demo: setup
	$(TEST_ENV) $(BIN)/python -m bench.demo $(if $(MODEL),--model $(MODEL))

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info
