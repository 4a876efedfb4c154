# make test: lint, types, tests. make demo: the whole pipeline on a simulated data set, scored.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Starts, kills and resumes trainings: in workers that have done nothing else.
KILLS := test_interruptions.py
DEMO := paths.input=demo/input paths.output=demo/output paths.saved_models=demo/saved_models

.PHONY: help install test lint demo docs benchmark clean

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

install: $(STAMP) ## make .venv and install the package into it
$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), f'Python 3.10 or newer is needed, this is {sys.version}'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e '.[dev]'
	touch $@

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/$(KILLS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/$(KILLS)

demo: $(STAMP) ## simulate, prepare, train, predict and score; about 4 minutes on two cores
	rm -rf demo
	$(BIN)/python 00_make_phantom.py $(DEMO)
	$(BIN)/python 01_create_dataset.py $(DEMO)
	$(BIN)/python 02_create_mask.py $(DEMO)
	$(BIN)/python 03_create_solution.py $(DEMO)
	$(BIN)/python 11_train.py $(DEMO) experiment=demo
	$(BIN)/python 21_predict.py $(DEMO) checkpoints=demo/saved_models/demo/best.ckpt
	$(BIN)/python 22_score.py $(DEMO) solution=demo/input/test_solution.csv
	$(BIN)/python -m czii25d.pipeline.demo $(DEMO)

docs: $(STAMP) ## the site of docs/ into site/, without a network but for the install; any warning is an error
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html; for the search: $(BIN)/python -m http.server -d site"

benchmark: $(STAMP) ## speed and memory beside the published procedure, on the data set in INPUT (default input)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[benchmark]'
	$(BIN)/python benchmarks/run.py $(or $(INPUT),input)

clean: ## remove the demo and all caches
	rm -rf demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis
