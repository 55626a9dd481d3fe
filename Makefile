# What CI runs, under the same names. A fresh clone needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in as many processes as there are cores, a file in one: its tests share runs, and the engine's look for
# processes that other runs of Flower would have started as well.
JOBS ?= auto
FILES := pyproject.toml constraints.txt
# Tests use Flower; nothing of them may talk to the internet.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint types tests fast docs bench clean

demo: $(VENV)/.installed  ## install, and run SSFL on 20 clients, in process (well under a minute after installation)
	$(BIN)/ssfl run

test: $(VENV)/.installed-dev lint types docs tests  ## everything CI checks

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed-dev
	$(BIN)/mypy

tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 25

fast: $(VENV)/.installed-dev  ## the tests that start no Flower processes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

docs: $(VENV)/.installed-dev  ## the docs site, in site/; a link that leads nowhere is an error
	$(BIN)/python docs/lay_out.py
	$(BIN)/zensical build --strict

bench: $(VENV)/.installed-dev  ## record benchmarks/results again (by hand, longer: tables.py cifar10, study.py, shift.py, masks.py)
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/tables.py digits
	$(BIN)/python benchmarks/memory.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version' \
		|| (echo "set another one: make demo PYTHON=/path/to/python3.11"; exit 1)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(FILES) | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e ".[app]"
	@touch $@

$(VENV)/.installed-dev: $(FILES) | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist site .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
