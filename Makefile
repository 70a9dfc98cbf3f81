# Everything runs in .venv, which is made and brought up to date as needed. A stamp file says what is in it.
#   make drill DRILL="--compare"      make test TEST="tests/unit/test_settings.py -x"      PYTHON=python3.12 make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST ?=
# The two ends of what is claimed to work; the torch between them is what everything else is run with.
TORCH_VERSIONS ?= 2.4.0 2.14.1
# Most tests wait for processes rather than compute: more of them at a time than there are cores.
JOBS ?= 4
DRILL ?=
BENCH ?=

.PHONY: help drill test torch-versions lint format bench unchanged chaos network network-chaos slurm containers frameworks gpu nccl nccl-chaos wheel docs clean

help:
	@echo "make drill        evict a rank of a real training job here, and see what happens"
	@echo "make test         the tests"
	@echo "make torch-versions   the tests with the oldest and the newest torch (several GB each)"
	@echo "make lint         ruff and mypy          make format   let ruff fix what it can"
	@echo "make bench        what the agent costs   make chaos    long randomized fault injection"
	@echo "make frameworks   tests with real Ray, Lightning, ...   make gpu   tests that need a GPU"
	@echo "make nccl         torch's own ProcessGroupNCCL without a GPU (5.5 GB): tests/gpu and tests/nccl"
	@echo "make nccl-chaos   random evictions and faults there (CHAOS_RUNS)"
	@echo "make network      jobs on several hosts (network namespaces, as root), also with faults   make network-chaos"
	@echo "make slurm        jobs on a real SLURM of the tests' own (as root; installs Debian's packages where apt is)"
	@echo "make containers   build the Dockerfiles with docker or podman, and evict containers of the images"
	@echo "make unchanged    CPython's own tests, with the agent and without"
	@echo "make wheel        build dist/*.whl       make docs     build site/, the docs as a site"
	@echo "make clean        remove .venv and caches"

drill: $(VENV)/.has-drill
	$(BIN)/autoteardown drill $(DRILL)

test: $(VENV)/.has-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TEST)

# An environment for each: 5 to 10 GB of disk, for the CUDA builds that an index has of them.
torch-versions: $(TORCH_VERSIONS:%=torch-%)

torch-%: .venv-torch/%/.has-test
	.venv-torch/$*/bin/python -m pytest -n $(JOBS) --dist worksteal $(TEST)

# The first line is the version's own torch; numpy 2 came after the oldest.
.venv-torch/%/.has-test: pyproject.toml $(wildcard startup_files/*)
	$(PYTHON) -m venv .venv-torch/$*
	.venv-torch/$*/bin/pip install -q --disable-pip-version-check 'pip>=25.1,<26'
	.venv-torch/$*/bin/pip install -q --disable-pip-version-check 'torch==$*' $(if $(filter 2.4.%,$*),'numpy<2',numpy)
	.venv-torch/$*/bin/pip install -q --disable-pip-version-check -e '.[drill]' --group test
	@touch $@

lint: $(VENV)/.has-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.has-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.has-test
	$(BIN)/python -m benchmarks $(BENCH)

chaos: $(VENV)/.has-test
	$(BIN)/python -m pytest -m chaos tests/processes $(TEST)

# Hosts are network namespaces: root only, skipped elsewhere. The quick ones of the first are part of the tests.
network: $(VENV)/.has-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow and not chaos" tests/network $(TEST)

network-chaos: $(VENV)/.has-test
	$(BIN)/python -m pytest -m chaos tests/network $(TEST)

# Namespaces with a whole SLURM in each: root only, skipped elsewhere. The quick ones are part of the tests.
SLURM_PACKAGES := slurmd slurmctld slurm-client munge slurm-wlm-basic-plugins
slurm: $(VENV)/.has-test
	@command -v slurmctld > /dev/null || ! command -v apt-get > /dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends $(SLURM_PACKAGES) > /dev/null; } || \
		echo "cannot be installed: $(SLURM_PACKAGES)"
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not frameworks" tests/slurm $(TEST)

# Skipped where neither engine is. Podman as root can do without base images (tests/container_engine.py).
containers: $(VENV)/.has-test
	$(BIN)/python -m pytest -m containers tests/image/test_containers.py $(TEST)

# CPython's own tests with and without the agent; the quick ones of them are part of the tests.
unchanged: $(VENV)/.has-test
	$(BIN)/python -m pytest -n 2 -m "slow or not slow" tests/processes/test_unchanged.py $(TEST)

# By file: the Ray tests share one cluster. TEST="-m 'frameworks and slow'" runs the rest of them.
frameworks: $(VENV)/.has-frameworks
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "frameworks and not slow" $(TEST)

# A machine with a GPU has a torch of its own, and often no network: nothing is installed there, and the agent is injected.
gpu:
	@if $(PYTHON) -c 'import pytest, torch, wrapt; assert torch.version.cuda or torch.version.hip' 2>/dev/null; \
	then python=$(PYTHON); else $(MAKE) $(VENV)/.has-test && python=$(BIN)/python; fi && \
	$$python -m pytest -o addopts=-ra -m gpu tests/gpu $(TEST)

# On libraries that stand for CUDA and NCCL (tests/nccl/README.md). TEST="tests/gpu -k stuck" selects; NCCL_TORCH=2.12.1
# is another torch for CUDA 13, which has its own environment.
NCCL_TORCH ?=
NCCL := $(if $(NCCL_TORCH),NCCL_TORCH=$(NCCL_TORCH)) $(PYTHON) tests/nccl/make.py .venv-nccl$(NCCL_TORCH:%=-%)
nccl:
	@$(NCCL) $(TEST)

# CHAOS_RUNS of them (20, which `make nccl` runs, too), CHAOS_WORKERS at a time, from CHAOS_SEED on.
nccl-chaos:
	@$(NCCL) -s tests/nccl/test_chaos.py $(TEST)

wheel: $(VENV)/.has-build
	$(BIN)/python -m build --wheel --outdir dist .

docs: $(VENV)/.has-docs
	$(BIN)/mkdocs build --strict --quiet

# Debian's Python can lack ensurepip (python3-venv); its pip can still fill the environment.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install -q pip; }

GROUPS_drill := torch
GROUPS_test := torch test
GROUPS_frameworks := torch test frameworks
GROUPS_lint := lint
GROUPS_build := build
GROUPS_docs := docs

# pip copies the start-up files, so an editable install has to follow them too.
$(VENV)/.has-%: pyproject.toml $(wildcard startup_files/*) | $(BIN)/python
	@# Groups came with pip 25.1; a venv of an older Python begins with an older one.
	@# 26 can no longer fill environments of Python 3.9, which the tests do.
	$(BIN)/python -m pip install -q --disable-pip-version-check 'pip>=25.1,<26'
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.$(if $(filter torch,$(GROUPS_$*)),[drill])' $(addprefix --group ,$(GROUPS_$*))
	@touch $@

clean:
	rm -rf $(VENV) .venv-torch dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
