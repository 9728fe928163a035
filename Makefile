# Two commands do everything: `make demo` and `make test`. The rest is for developers.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test chromium test-slow test-browser test-gpu check format lint type bench notebooks docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: asked for by another package, it may come with gigabytes of CUDA libraries.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt "$(TORCH)"
	$(PIP) install --quiet --constraint constraints.txt --editable '.[notebook]'
	@touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.developer  ## make .venv with everything that is pinned

demo: $(VENV)/.installed  ## the main job on the embedded model, end to end
	$(BIN)/workbench demo $(DEMO_FLAGS)

test: $(VENV)/.developer  ## the test suite
	$(BIN)/python -c "from workbench.models.embedded import embedded_folder; embedded_folder()"
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not gpu and not browser"

test-slow: $(VENV)/.developer  ## tests that take longer, many with the embedded model
	$(BIN)/python -c "from workbench.models.embedded import embedded_folder; embedded_folder()"
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "slow and not gpu and not browser"

# Chromium is no Python package: where none is found, Debian's is installed, with sudo unless run by root.
CHROMIUM := $(firstword $(foreach name,chromium chromium-browser google-chrome google-chrome-stable chrome,$(shell command -v $(name))))
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
chromium:
ifeq ($(CHROMIUM),)
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium
endif

test-browser: $(VENV)/.developer chromium  ## tests of the pages in Chromium, which is installed where it is missing
	$(BIN)/python -m pytest -q -n $(WORKERS) -m browser

test-gpu: $(VENV)/.developer  ## tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu

check: lint type test test-browser test-slow notebooks  ## exactly what CI runs

format: $(VENV)/.developer  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.developer  ## format and lint, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(VENV)/.developer  ## static types
	$(BIN)/basedpyright

bench: $(VENV)/.developer  ## compare with the peers, in one run each
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

notebooks: $(VENV)/.developer  ## execute the notebooks
	$(BIN)/python notebooks/execute.py

docs: $(VENV)/.developer  ## write the generated pages in docs/
	$(BIN)/python docs/generate.py

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
