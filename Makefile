# Everything runs in .venv, which is made on first use with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check docs docs-serve notebooks dist bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Make the environment (the other targets do so by themselves)

# torch comes first and alone: the pinned build is settled before anything else can ask for another.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dflow needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,codecs,docs]'
	touch $@

demo: $(INSTALLED)  ## Draw from a shipped model; train a grouped model and an LSTM on Python's help, compare (in demo/)
	rm -rf demo
	$(BIN)/dflow generate --model tolstoy --n 3
	$(BIN)/dflow train demo_grouped
	$(BIN)/dflow train demo_lstm
	$(BIN)/dflow generate --model demo/grouped --n 100 --output demo/samples.txt
	head -n 40 demo/samples.txt
	$(BIN)/dflow compare demo/grouped demo/lstm --output demo
	@echo "100 samples: demo/samples.txt; table and plot: demo/compare.md, demo/compare.png"

test: $(INSTALLED)  ## Run the tests and the examples in docstrings (under eight minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(INSTALLED)  ## Run the slow tests: kills, damage, several processes, resuming, plug-ins
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: $(INSTALLED)  ## Lint, formatting, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)  ## Build the documentation site into site/, a warning or a dead link being an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(INSTALLED)  ## Show the documentation site on this machine, anew after each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

notebooks: $(INSTALLED)  ## Run the notebooks, and store what they print and draw
	$(BIN)/python scripts/run_notebooks.py

dist: $(INSTALLED)  ## Build sdist and wheel into dist/, and check what a package index would show of them
	rm -rf dist build
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: $(INSTALLED)  ## Measure the operations against their baselines
	$(BIN)/python scripts/bench_ops.py

clean:  ## Remove the environment and what the tools cache
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
