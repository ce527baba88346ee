# Everything runs in .venv, with the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export UV_CONSTRAINT := $(CURDIR)/constraints.txt
# Keep compiled modules, whatever the machine prefers: the tests start Python a hundred times.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint types imports unit bench format help clean
.DEFAULT_GOAL := help

help: ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# torch comes first and alone: it decides which build every other package sees.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement <(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

SHELL := /bin/bash

demo: .venv/installed ## scpl and early-exit on two processes against bp on one core; write a report
	$(BIN)/scpl compare quick/demo --processes 2 --out runs/demo

test: lint types unit ## everything that CI checks

lint: .venv/installed ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed ## static types
	$(BIN)/mypy

imports: .venv/installed ## imports point one way
	$(BIN)/python -m pytest tests/test_imports.py

# A process per core; the tests of a file stay together, because some share what took long to make.
# tests/conftest.py decides on the order of files.
unit: .venv/installed ## all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: .venv/installed ## the benchmarks that end within minutes
	$(BIN)/python benchmarks/memory/main.py
	$(BIN)/python benchmarks/overhead/main.py

format: .venv/installed ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
