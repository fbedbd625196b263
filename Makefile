# Each target does all of its own set-up on a fresh Debian 12 machine with Python 3.11 or newer.
#
#   make setup    .venv with locked, hash-checked dependencies and the commands of the project; quick when nothing changed
#   make system   what lies outside Python: packages by apt, a QEMU that works under TCG, a guest kernel, promtool,
#                 Xen's stream verifier, the image of a Xen host
#   make demo     a real virtual machine migrates through two relays on this machine
#   make check    format, lint, types, layering
#   make test     every test that is not slow       (PYTEST_ARGS="-k name -x" to narrow)
#   make e2e      only the tests that drive real hypervisors
#   make e2e-xen  only those with two real Xen hosts, the slow ones too: a pair of hosts for each processor
#   make bench    what the relay pair costs, step by step, beside its peers and under QEMU, and what encoding pages
#                 saves: one run, below sixteen minutes
#   make model    every order of faults in a hand-over, as far as the model goes: some ten minutes, and 2 GiB of memory
#   make soak     relays under load and faults for 15 minutes: all exact, and level at the end  (SOAK_SECONDS, SOAK_SEED)
#   make lock     compute the lock files anew after a change of dependencies in pyproject.toml

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup system system-demo demo test e2e e2e-xen check format bench model soak lock

VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@deploy/rig/setup-venv $(VENV)

system-demo:
	@deploy/rig/system-packages run
	@deploy/rig/fetch-qemu
	@deploy/rig/fetch-kernel

# After setup: the image's Python modules are fetched with the pip of the virtual environment.
system: setup system-demo
	@deploy/rig/fetch-promtool
	@deploy/rig/fetch-verify-stream
	@deploy/rig/fetch-xen

demo: setup system-demo
	$(BIN)/korora demo

test: setup system
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

e2e: setup system
	$(BIN)/python -m pytest -m 'e2e' $(PYTEST_ARGS)

e2e-xen: setup system
	$(BIN)/python -m pytest -m 'xen' tests/e2e/xen -n auto --maxprocesses=4 --maxschedchunk=1 $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup system
	@deploy/rig/system-packages bench
	$(BIN)/python -m bench

model: setup
	@deploy/rig/system-packages run
	$(BIN)/python -m tests.model

SOAK_SECONDS ?= 900
SOAK_SEED ?=
SOAK_JSON ?= soak.json
soak: setup
	$(BIN)/python -m tests.chaos.soak --seconds $(SOAK_SECONDS) --json $(SOAK_JSON) $(addprefix --seed ,$(SOAK_SEED))

# pip-tools is the one tool not locked: it makes the lock. Run this under the oldest Python supported, 3.11.
PIP_COMPILE := $(VENV)-lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host
export CUSTOM_COMPILE_COMMAND := make lock
lock: setup
	$(BIN)/python -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet pip-tools
	$(PIP_COMPILE) --output-file=requirements/runtime.lock pyproject.toml
	$(PIP_COMPILE) --extra=dev --constraint=requirements/runtime.lock --output-file=requirements/dev.lock pyproject.toml
