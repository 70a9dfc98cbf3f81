# Everything runs in .venv, which is made and brought up to date as needed. A stamp file says what is in it.
#   make drill DRILL="--compare"      make test TEST="tests/unit/test_settings.py -x"      PYTHON=python3.12 make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST ?=
# Most tests wait for processes rather than compute: more of them at a time than there are cores.
JOBS ?= 4
DRILL ?=
BENCH ?=

.PHONY: help drill test lint format bench chaos frameworks gpu wheel clean

help:
	@echo "make drill        evict a rank of a real training job here, and see what happens"
	@echo "make test         the tests"
	@echo "make lint         ruff and mypy          make format   let ruff fix what it can"
	@echo "make bench        what the agent costs   make chaos    long randomized fault injection"
	@echo "make frameworks   tests with real Ray, Lightning, ...   make gpu   tests that need a GPU"
	@echo "make wheel        build dist/*.whl       make clean    remove .venv and caches"

drill: $(VENV)/.has-drill
	$(BIN)/autoteardown drill $(DRILL)

test: $(VENV)/.has-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TEST)

lint: $(VENV)/.has-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.has-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.has-test
	$(BIN)/python -m benchmarks $(BENCH)

chaos: $(VENV)/.has-test
	$(BIN)/python -m pytest -m chaos $(TEST)

# By file: the Ray tests share one cluster.
frameworks: $(VENV)/.has-frameworks
	$(BIN)/python -m pytest -n 2 --dist loadfile -m frameworks $(TEST)

# A machine with a GPU has a torch of its own, and often no network: nothing is installed there, and the agent is injected.
gpu:
	@if $(PYTHON) -c 'import pytest, torch, wrapt; assert torch.version.cuda or torch.version.hip' 2>/dev/null; \
	then python=$(PYTHON); else $(MAKE) $(VENV)/.has-test && python=$(BIN)/python; fi && \
	$$python -m pytest -o addopts=-ra -m gpu tests/gpu $(TEST)

wheel: $(VENV)/.has-build
	$(BIN)/python -m build --wheel --outdir dist .

# Debian's Python can lack ensurepip (python3-venv); its pip can still fill the environment.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install -q pip; }

EXTRAS_drill := torch,drill
EXTRAS_test := torch,drill,test
EXTRAS_frameworks := torch,drill,test,frameworks
EXTRAS_dev := dev
EXTRAS_build := build

# pip copies the start-up files, so an editable install has to follow them too.
$(VENV)/.has-%: pyproject.toml $(wildcard startup_files/*) | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$(EXTRAS_$*)]'
	@touch $@

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
