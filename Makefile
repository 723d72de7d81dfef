# Two commands do everything on a bare machine, each alone: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test coverage lint clean

help: ## List the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

# One thread: so small a network gains nothing by more, and on a busy machine they wait for each other.
demo: $(VENV)/.installed ## Sign a classifier of real handwritten digits and print the verdict beside its unmarked twin
	OMP_NUM_THREADS=1 $(BIN)/gradsigns train experiment=demo twin=true $(ARGS)

# Two workers of one thread each: two threads each would wait for each other on two cores.
test: $(VENV)/.installed-dev ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

coverage: $(VENV)/.installed-dev ## Run all tests with coverage, which takes a third longer
	rm -f .coverage .coverage.*
	$(MAKE) test ARGS="--cov --cov-report= $(ARGS)"
	$(BIN)/coverage report --include='*/core/*,*/verification/*,*/evidence/*,*/oracles/*,*/integration/*' --fail-under=95

lint: $(VENV)/.installed-dev ## Check style, types and the dependency direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove what the commands made
	rm -rf $(VENV) build dist .coverage .coverage.* outputs multirun

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || (echo "Python's venv module is missing; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "Installing into $(VENV); torch is large, this takes some minutes."
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	@echo "Installing into $(VENV); torch is large, this takes some minutes."
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.installed
