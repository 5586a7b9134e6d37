# Everything runs inside .venv and can be run again at any time.
#   PYTHON=python3.12        interpreter that .venv is made with
#   DEVICE=cpu|cuda          otherwise: cuda if nvidia-smi lists a GPU
#   TORCH_INDEX=<url>        where to take torch from, e.g. PyTorch's CPU wheel index; empty: pip's own configuration
#   TEST_WORKERS=<n>         parallel test processes;  PYTEST_ARGS="-m gpu -x" goes to pytest
PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
TORCH_INDEX ?=
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
comma := ,
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
SHIM := packaging/fbgemm-gpu-cpu-shim
STAMP := .venv/installed-$(DEVICE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check format bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(STAMP) ## make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt $(SHIM)/pyproject.toml
ifeq ($(filter $(DEVICE),cpu cuda),)
	$(error DEVICE must be cpu or cuda, got '$(DEVICE)')
endif
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed, .venv has %s: remove .venv, then make install PYTHON=python3.11" % sys.version.split()[0])'
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) $(if $(filter cpu,$(DEVICE)),./$(SHIM)) -e '.[dev$(if $(filter cuda,$(DEVICE)),$(comma)cudnn)]'
	rm -f .venv/installed-*
	touch $@

demo: install ## prepare a small public dataset, train, evaluate and recommend
	$(BIN)/gbla-rec demo

test: install ## run all tests
	$(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

check: install ## lint, format check, types, import contracts, dependency consistency
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pip check --disable-pip-version-check

format: install ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## run every benchmark that this machine can run and that needs no options; replaces benchmarks/results
	set -e; for script in $$(grep -l '__name__ == "__main__"' benchmarks/*.py | xargs grep -L 'required=True'); do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove caches and build products; .venv and workspace stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis $(SHIM)/build $(SHIM)/*.egg-info
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
