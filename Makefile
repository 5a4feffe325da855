# Everything a newcomer types. Each target works alone on a fresh clone: it makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The suite's tolerances and the demo's comparison are for the CPU, where PyTorch runs too. `make bench` takes what JAX finds.
TEST_ENV := JAX_PLATFORMS=cpu
TORCH ?= torch==2.13.0

.PHONY: setup demo test test-slow lint format bench clean

# Everything: what the suite, the programs and the notebooks need.
setup: $(VENV)/.installed

# The library alone, for a first look.
$(VENV)/.library: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# The oracle, PyTorch, as a CPU build, before anything that would pull the CUDA one.
$(VENV)/.oracle: $(VENV)/.library
	PYTHON=$(BIN)/python sh tools/install_torch.sh "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.oracle pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test,bench,train,eval,notebook]'
	touch $@

# A completion first, and PyTorch, which takes longer to fetch than the rest, after it.
demo: $(VENV)/.library
	$(TEST_ENV) $(BIN)/python -m bench.demo complete $(if $(MODEL),--model $(MODEL))
	@echo; echo "Installing PyTorch, to judge (once) ..."
	@$(MAKE) --no-print-directory $(VENV)/.oracle
	$(TEST_ENV) $(BIN)/python -m bench.demo check $(if $(MODEL),--model $(MODEL))

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
