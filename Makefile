# make run [ARGS="--run.steps 3 …"]   train: sets up on first use, starts Ray unless it runs, submits launch/run.py
# make test | lint | setup | clean
#
# torch comes from pip's configured index; if that has a CPU build (2.13.0+cpu), pip prefers it.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory

# CUDA_VISIBLE_DEVICES= (empty) hides the machine's GPUs and selects the CPU environment.
FLAVOUR := $(shell [ -n "$${CUDA_VISIBLE_DEVICES-all}" ] && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := requirements-$(FLAVOUR).lock
READY := .venv/ready-$(FLAVOUR)
BIN := .venv/bin

.PHONY: run test lint setup clean

run: $(READY)
	@exec $(BIN)/python -m launch.runtime.submit $(ARGS)

test: $(READY)
	@exec $(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# $(READY) is written last and removed first: an environment without it is incomplete and is created again.
# The locks are complete, so pip resolves no dependencies; --no-deps also excludes packages that fail with a CPU torch.
$(READY): $(LOCK)
	@python=
	for candidate in python3 python3.13 python3.12 python3.11; do
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
	        python=$$candidate; break
	    fi
	done
	if [ -z "$$python" ]; then echo "Horizon needs Python 3.11, 3.12 or 3.13 with its venv module; found none" >&2; exit 1; fi
	$$python launch/planning/checks.py
	if [ ! -e $@ ]; then rm -rf .venv; fi
	rm -f $@
	echo "Setting up .venv from $(LOCK) (a few minutes, once; log: .venv/setup.log)" >&2
	$$python -m venv .venv
	install() {
	    if ! $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check "$$@" >>.venv/setup.log 2>&1; then
	        reason=$$(grep ERROR .venv/setup.log | tail -n 1 || tail -n 1 .venv/setup.log)
	        if grep -q Retrying .venv/setup.log; then reason="no package index can be reached"; fi
	        echo "Setup failed: $$reason (more in .venv/setup.log)" >&2
	        exit 1
	    fi
	}
	: >.venv/setup.log
	if [ $(FLAVOUR) = cpu ]; then install --constraint $(LOCK) torch==2.13.0; fi
	install --no-deps --requirement $(LOCK)
	touch $@

clean:
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
