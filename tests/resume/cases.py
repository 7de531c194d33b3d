"""
Every trainer with every feature that has a state of its own: how such a run is built, and which combinations mean
nothing. Rows are `TRAINERS`, columns `FEATURES`. The cells that are no run are in `REFUSED`, with the error that says
so, and in `SAME`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from pipelines import dpo_then_ppo_worker as pipeline
from transformers import AutoModelForCausalLM

from trl_ext import (
    DAPOTrainer,
    DifficultyCurriculum,
    DPOConfig,
    DPOTrainer,
    DUPOTrainer,
    GRPOTrainer,
    GSPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOTrainer,
    VAPOTrainer,
)
from trl_ext.pipelines.dpo_then_ppo import DPOThenPPO
from trl_ext.rewards.objectives import ObjectiveSchedule, RewardConstraint, RewardObjectives


STEPS = 5
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}
PAIRS, PIPELINE = "DPO", "DPO then PPO"
GROUPS = {"GRPO": GRPOTrainer, "RLOO": RLOOTrainer, "DAPO": DAPOTrainer, "DUPO": DUPOTrainer, "GSPO": GSPOTrainer}
CRITICS = {"PPO head": "head", "PPO model": "model", "VAPO": "model"}
# Some of whose five steps are the critic's; with a KL, which can adapt
VAPO = {"critic_warmup_steps": 3, "critic_warmup_explained_variance": 0.5, "lam_alpha": 0.4, "kl_coef": 0.05}
TRAINERS = (*GROUPS, *CRITICS, PAIRS, PIPELINE)


@dataclass(frozen=True)
class Feature:
    """
    What a column adds.

    Args:
        settings (`dict`):
            Of the configuration that generates, for every trainer.
        of (`dict[str, dict]`):
            Further settings, by trainer.
        adapter, quantized, evaluates, curriculum, objectives (`bool`):
            What else it takes.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    of: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: bool = False
    quantized: bool = False
    evaluates: bool = False
    curriculum: bool = False
    objectives: bool = False


ONCE = {"num_iterations": 1, "updates_per_generation": 1}
REFRESHED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
WITH_KL = {name: {"beta": 0.1} for name in GROUPS}
ADAPTIVE = {
    **{"kl_target": 0.1, "kl_rule": "exponential", "old_kl_coef": 0.5, "old_kl_target": 0.01},
    "reward_scaling": "running",
}
ADAPTING = dict.fromkeys((*CRITICS, PIPELINE), ADAPTIVE)
# What all trainers that generate can do at once; each batch lasts for four steps
ALL = {"num_iterations": 2, "updates_per_generation": 2}
FEATURES = {
    "plain": Feature(),
    "LoRA": Feature(adapter=True),
    "QLoRA": Feature(adapter=True, quantized=True),
    "sync_ref_model": Feature(REFRESHED, WITH_KL),
    "eval in between": Feature(evaluates=True),
    "curriculum": Feature(curriculum=True),
    "objectives": Feature(objectives=True),
    "adaptive KL": Feature(ADAPTIVE),
    "informed draws": Feature(
        {"refill_draws": "informed"},
        {name: {"rollout_selection": "refill"} for name in ("GRPO", "RLOO", "GSPO", *CRITICS, PIPELINE)},
    ),
    "half-used batches": Feature({"updates_per_generation": 2}),
    "num_iterations 2": Feature({"num_iterations": 2}),
    "LoRA and sync_ref_model": Feature(REFRESHED, WITH_KL, adapter=True),
    "all at once": Feature(ALL, ADAPTING, adapter=True, evaluates=True, curriculum=True, objectives=True),
    "LoRA, eval and curriculum": Feature(adapter=True, evaluates=True, curriculum=True),
}

# Why a cell is no run: the error with which it is refused
UNKNOWN = "unexpected keyword argument"
REFUSED = {
    **{(name, "adaptive KL"): UNKNOWN for name in (*GROUPS, PAIRS)},  # only PPO has a coefficient that adapts
    **{(PAIRS, name): UNKNOWN for name in ("informed draws", "half-used batches", "num_iterations 2")},  # no rollouts
    (PAIRS, "all at once"): UNKNOWN,
    (PAIRS, "objectives"): "RewardObjectives needs a trainer of trl_ext",  # no reward functions
    ("DUPO", "informed draws"): "refill_draws='informed' has no effect with rollout_selection='duplicate'",
    (PIPELINE, "plain"): "`peft_config` is missing: what DPO hands to the next stage is an adapter",
}
# What a different column has as well. The pipeline always has an adapter
SAME = {
    (PIPELINE, "LoRA and sync_ref_model"): "sync_ref_model",
    **{(name, "LoRA, eval and curriculum"): "all at once" for name in TRAINERS if name != PAIRS},
}
CELLS = [(trainer, name) for trainer in TRAINERS for name in FEATURES]
RUNS = [cell for cell in CELLS if cell not in REFUSED and cell not in SAME]


def lora(**overrides: Any) -> LoraConfig:
    """With dropout, which draws random numbers in every pass."""
    return tiny.lora(lora_dropout=0.1, task_type="CAUSAL_LM", **overrides)


def policy(folder: Path, quantized: bool) -> Any:
    """The policy that a run starts from, saved in `folder` by the first that asks."""
    place = folder / ("quantized" if quantized else "policy")
    if not place.exists():
        # bitsandbytes packs layers whose sizes are multiples of 64
        shape = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2} if quantized else {}
        model = tiny.qwen2(**shape)
        with torch.no_grad():  # ends about half of the completions
            model.get_input_embeddings().weight[2] *= 2.0
        model.save_pretrained(f"{place}.{os.getpid()}")
        Path(f"{place}.{os.getpid()}").rename(place)
    if not quantized:
        return str(place)
    return AutoModelForCausalLM.from_pretrained(place, quantization_config=tiny.nf4())


def live_for_half(**columns: Any) -> list[float]:
    """Groups of every other prompt have variance."""
    rewards: list[float] = tiny.LiveFor(set(range(4, 24, 2)))(**columns)
    return rewards


def objectives() -> RewardObjectives:
    return RewardObjectives(
        {"low_ids": ObjectiveSchedule([(0.0, 0.0), (1.0, 1.0)])}, [RewardConstraint("live_for_half", 0.5, 0.3)]
    )


def pairs() -> Dataset:
    """With a column that says how hard each is."""
    given = pipeline.pairs(24)
    return given.add_column("margin", [float((i * 7) % 24) for i in range(24)])


def built(trainer: str, name: str, folder: Path, output: Path) -> Any:
    """
    A run that can be trained.

    Args:
        trainer, name (`str`):
            Row and column.
        folder (`Path`):
            For what runs share: the policy that they start from.
        output (`Path`):
            The run's own.
    """
    chosen = FEATURES[name]
    settings = {**SAVING, **chosen.settings, **chosen.of.get(trainer, {})}
    build: Callable[..., Any] = {PAIRS: _pairs, PIPELINE: _pipeline}.get(trainer, partial(_rollouts, trainer))
    return build(chosen, settings, policy(folder, chosen.quantized), output)


def _rollouts(trainer: str, chosen: Feature, settings: dict[str, Any], model: Any, output: Path) -> Any:
    settings = {"num_generations": 4, **ONCE, "model_init_kwargs": {"dtype": "float32"}, **settings}
    if not isinstance(model, str):
        del settings["model_init_kwargs"]
    if trainer in CRITICS:
        settings |= {"critic": CRITICS[trainer], "critic_learning_rate": 0.05, **(VAPO if trainer == "VAPO" else {})}
    arguments: dict[str, Any] = {"model": model}
    if chosen.quantized and CRITICS.get(trainer) == "model":  # it can't start from a quantized policy
        arguments["value_model"] = tiny.classifier()
    if chosen.adapter:
        arguments["peft_config"] = lora()
    if chosen.curriculum:
        arguments["curriculum"] = DifficultyCurriculum("frontier")
    if chosen.evaluates:
        arguments["eval_dataset"] = tiny.prompts(4)
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
    rewards = [live_for_half, tiny.low_ids] if chosen.objectives else live_for_half
    trainer_class = VAPOTrainer if trainer == "VAPO" else GROUPS.get(trainer, PPOTrainer)
    made = tiny.trainer(trainer_class, output, rewards, arguments, **settings)
    if chosen.objectives:
        objectives().attach(made)
    return made


def _pairs(chosen: Feature, settings: dict[str, Any], model: Any, output: Path) -> Any:
    given: dict[str, Any] = {"model": model, "train_dataset": pairs(), "processing_class": tiny.tokenizer()}
    if isinstance(model, str):
        settings["model_init_kwargs"] = {"dtype": "float32"}
    if chosen.adapter:
        given["peft_config"] = lora()
    if chosen.curriculum:
        given["curriculum"] = DifficultyCurriculum("easy_to_hard", column="margin")
        settings["remove_unused_columns"] = False
    if chosen.evaluates:
        given["eval_dataset"] = pairs().select(range(4))
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
    made = DPOTrainer(args=DPOConfig(**tiny.pair_settings(output, **settings)), **given)
    if chosen.objectives:
        objectives().attach(made)
    return made


def _pipeline(chosen: Feature, settings: dict[str, Any], model: Any, output: Path) -> DPOThenPPO:
    dpo: dict[str, Any] = {"max_steps": 3, "save_steps": 1}
    given: dict[str, Any] = {"policy_kwargs": {}, "dpo_kwargs": {}}
    rewards = [live_for_half, tiny.low_ids] if chosen.objectives else [live_for_half]
    if chosen.settings.get("sync_ref_model"):
        given["reference"] = "dpo"
    if chosen.curriculum:
        given["policy_kwargs"]["curriculum"] = DifficultyCurriculum("frontier")
        given["dpo_kwargs"]["curriculum"] = DifficultyCurriculum("easy_to_hard", column="margin")
        dpo["remove_unused_columns"] = False
    if chosen.evaluates:
        given["policy_kwargs"]["eval_dataset"] = tiny.prompts(4)
        given["eval_pairs"] = pairs().select(range(4))
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
        dpo |= {"eval_strategy": "steps", "eval_steps": 1}

    def prepare(stage: str, trainer: Any) -> None:
        if chosen.objectives and stage == "ppo":
            objectives().attach(trainer)

    return pipeline.schedule(
        output,
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) if isinstance(model, str) else model,
        reward_funcs=rewards,
        dpo_args=pipeline.dpo_args(**dpo),
        policy_args=PPOConfig(**tiny.cpu_settings("unused", **{**ONCE, **settings})),
        pairs=pairs(),
        pair_settings={},
        fit_critic=0,
        held_out=None,
        peft_config=None if chosen == FEATURES["plain"] else lora(),
        prepare=prepare,
        **given,
    )
