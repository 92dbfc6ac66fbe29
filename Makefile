# advjax: `make demo` and `make test` need Python 3.11 or 3.12 and, the first time, the internet.
# Every target sets up .venv by itself and leaves it alone while it is up to date.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-studies lint format types imports ci bench peers constraints clean

VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
WORKDIR := runs/demo
comma := ,
# Workers for pytest; each compiles for itself (7 to 15 % more CPU in all than JOBS=0 on an early suite).
JOBS := 2
# Words after `make test` for pytest: make test ARGS='-k pgd -x'
ARGS :=

# Runs: is it a Python that works (a pyenv shim can stand there and fail), is it 3.11 or 3.12, and
# can it make an environment (Debian's needs the package python3-venv)?
PROBE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

NO_PYTHON := advjax needs Python 3.11 or 3.12 with a working venv module, and found none \
  $(if $(PYTHON),at PYTHON=$(PYTHON),on the PATH); name one: make PYTHON=/path/to/python3.12 test

# $(call set_up,FOLDER,EXTRAS and options): the interpreter is $(PYTHON) if given, else the first
# that passes the probe; the environment's own comes first, so that it stays what it is.
define set_up
@found=; \
for python in $(or $(PYTHON),$(1)/bin/python python3.12 python3.11 python3 python); do \
  if "$$python" -c '$(PROBE)' >/dev/null 2>&1 </dev/null; then found="$$python"; break; fi; \
done; \
if [ -z "$$found" ]; then echo "$(NO_PYTHON)" >&2; exit 2; fi; \
"$$found" tools/setup_venv.py $(1) $(2) $(if $(PYTHON),--this-python)
endef

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv:  ## Only set up .venv
	$(call set_up,$(VENV),test$(comma)notebooks)

demo: venv  ## From nothing to a robustness curve: table, CSV and figures in runs/demo
	$(BIN)/python launch/evasion.py --workdir=$(WORKDIR)

test: venv  ## Unit tests and doctests
	$(BIN)/python -m pytest -n $(JOBS) --dist=worksteal -m 'not slow and not study' $(ARGS)

# Unlike `make test`, compiled as for users: see tests/conftest.py.
AS_USERS := XLA_FLAGS="$${XLA_FLAGS-}" JAX_DISABLE_MOST_OPTIMIZATIONS=0

test-slow: venv  ## Strength on the reference networks, interruption, several processes
	$(AS_USERS) $(BIN)/python -m pytest -n $(JOBS) --dist=worksteal -m 'slow and not study' $(ARGS)

test-studies: venv  ## Whole studies, long trainings and compilations: before a release
	$(AS_USERS) $(BIN)/python -m pytest -n $(JOBS) --dist=worksteal -m study $(ARGS)

lint: venv  ## Ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv  ## Ruff: mend what it can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: venv  ## Static types (pyrefly)
	$(BIN)/pyrefly check

imports: venv  ## Which folder may know which (import-linter)
	$(BIN)/lint-imports

ci:  ## All that CI does, with the time of every stage
	bash .ci/run </dev/null

peers:  ## An environment of its own with Foolbox, torchattacks, ART and ByzFL
	$(call set_up,$(PEERS),test$(comma)peers --no-deps=torchattacks$(comma)byzfl)

bench: peers  ## Our curves against the peers, on the same weights and images
	OMP_WAIT_POLICY=passive $(PEERS)/bin/python benchmarks/evasion.py $(ARGS)

constraints: venv  ## Resolve the pinned versions anew
	$(BIN)/python tools/constraints.py

clean:  ## Remove environments, caches and build leftovers (not runs/)
	rm -rf $(VENV) $(PEERS) $(VENV).lock $(PEERS).lock .cache .pytest_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
