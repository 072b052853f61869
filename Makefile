# The commands of this project. `make` alone lists them.

PYTHON ?= python3.11
LOCK   ?= requirements.lock
BIN    := .venv/bin

.DEFAULT_GOAL := help
.PHONY: bench-eval bench-gate bench-online help install lock quickstart test lint test-slow test-gpu proof-quickstart bench-data bench-train bench-ppo bench-memory clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

# The stamp is newer than the lock and the project file: installed means installed.
install: .venv/.installed  ## Make .venv and install everything from the lock.

.venv/.installed: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys; assert sys.version_info[:2] == (3, 11)' 2>/dev/null || \
	  { echo "posttrain needs Python 3.11 with venv (Debian, Ubuntu: apt-get install python3.11-venv)."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch' || \
	  { echo "pip took torch's CUDA build: use LOCK=requirements-cuda.lock, or give pip torch's CPU index."; exit 1; }
	@touch $@

lock:  ## Resolve the dependencies again and write both locks (takes a quarter of an hour).
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet -e '.[dev]' hatchling editables
	.lock-venv/bin/python -m pip install --quiet --no-deps "$$(sed -nE 's/^quickstart = \["(.*)"\]/\1/p' pyproject.toml)"
	.lock-venv/bin/python -m pip freeze --all --exclude-editable --exclude pip \
	  | sed -E 's/^(torch==[0-9.]+)\+cpu/\1/' | sort -f > requirements.lock
	env -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null \
	  .lock-venv/bin/python -m pip install --quiet --dry-run --ignore-installed \
	  --report .lock-venv/cuda.json "$$(grep '^torch==' requirements.lock)"
	$(PYTHON) .ci/cuda_lock.py .lock-venv/cuda.json requirements.lock requirements-cuda.lock
	rm -rf .lock-venv

quickstart: install  ## Fine-tune a real 135M chat model on this machine, from data to verdict.
	@$(BIN)/posttrain run configs/quickstart.yaml

test: install lint  ## Lint, types, import contracts, tests.
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: install  ## Tests that take minutes.
	$(BIN)/python -m pytest -m slow

test-gpu: install  ## Tests that need a CUDA device.
	$(BIN)/python -m pytest -m gpu

proof-quickstart: install  ## Time the quickstart, cold and cached; the last line is JSON.
	@$(BIN)/python benchmarks/quickstart.py

# Peers have requirements of their own, so they get an environment of their own.
.venv-peers/.installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# BENCH passes options on, such as BENCH="--corpus DIR --hub DIR --only near".
bench-data: install .venv-peers/.installed  ## Speed, recall and memory of the data stage, beside its peers.
	@$(BIN)/python benchmarks/data.py --peers-python .venv-peers/bin/python $(BENCH)

bench-train: install  ## Speed of the training stages beside plain TRL scripts, and their overhead.
	@$(BIN)/python benchmarks/train.py $(BENCH)

# TRL's last release with PPO needs an environment of its own, too.
.venv-peers-ppo/.installed: benchmarks/peers/requirements-ppo.txt
	$(PYTHON) -m venv .venv-peers-ppo
	.venv-peers-ppo/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

bench-ppo: install .venv-peers-ppo/.installed  ## Speed of PPO and DPO beside TRL, and of a cached reference.
	@$(BIN)/python benchmarks/ppo.py --peers-python .venv-peers-ppo/bin/python $(BENCH)

bench-online: install  ## Learning curves of PPO, GRPO and RLOO on one task.
	@$(BIN)/python benchmarks/online.py $(BENCH)

bench-eval: install  ## Speed of benchmarks with shared prefixes beside lm-eval's own model.
	@$(BIN)/python benchmarks/evaluation.py $(BENCH)

bench-gate: install  ## How often the gate is right, by simulation.
	@$(BIN)/python benchmarks/gate.py $(BENCH)

bench-memory: install  ## Estimated memory beside what training really takes.
	@$(BIN)/python benchmarks/memory.py $(BENCH)

clean:  ## Remove the environment and all results.
	rm -rf .venv .venv-peers .venv-peers-ppo .posttrain
