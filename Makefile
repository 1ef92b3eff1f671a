# Every target starts from a fresh machine: `env` makes .venv with the locked versions, once.
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= configs/digits_class.yaml
BIN := .venv/bin
STAMP := .venv/.complete

.DEFAULT_GOAL := help
.PHONY: help env demo test system-test lint clean

help:
	@echo "make demo         train a latent diffusion model on real handwritten digits and look at what it draws"
	@echo "make test         the test suite"
	@echo "make system-test  several ranks, kills, restarts"
	@echo "make lint         ruff and the type checker"
	@echo "make env          .venv with the locked versions (the targets above call it)"
	@echo "make clean        remove what demo made: data/ and runs/"

env: $(STAMP)

# torch first: what is built against it must find it.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is wanted, {v[0]}.{v[1]} came; say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

