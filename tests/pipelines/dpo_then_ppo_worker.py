"""
The whole schedule on a tiny model, two rounds, in a process that may be killed: `dpo_then_ppo_worker.py OUTPUT`.
"""

import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from datasets import Dataset

from trl_ext import DPOConfig, PPOConfig
from trl_ext.pipelines.dpo_then_ppo import DPOThenPPO
from trl_ext.rewards.implicit import IMPLICIT_REWARD


def lora(**overrides: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **overrides})


def prompts(count: int = 24) -> Dataset:
    """With a space at the end, so that the tokens of a completion stay its own in the text of a pair."""
    return tiny.prompts(count).map(lambda row: {"prompt": f"{row['prompt']} "})


def pairs(count: int = 24) -> Dataset:
    """Words with even ids are better."""
    rows = range(count)
    return Dataset.from_dict(
        {
            "prompt": prompts(count)["prompt"],
            "chosen": [f"w{2 * (i % 9)} w{2 * (i % 7)}" for i in rows],
            "rejected": [f"w{2 * (i % 8) + 1} w{2 * (i % 6) + 1}" for i in rows],
        }
    )


def dpo_args(**overrides: Any) -> DPOConfig:
    settings = tiny.pair_settings("unused", per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=6)
    settings |= {"save_strategy": "steps", "save_steps": 2, "disable_dropout": False}
    return DPOConfig(**{**settings, **overrides})


def policy_settings(**overrides: Any) -> dict[str, Any]:
    settings = tiny.cpu_settings("unused", max_steps=6, save_strategy="steps", save_steps=2)
    return {**settings, **overrides}


def schedule(output_dir: Any, **overrides: Any) -> DPOThenPPO:
    """Pairs made from the policy; functions and the implicit reward, weighed; a KL to the base."""
    settings: dict[str, Any] = {
        "model": tiny.stopping(),
        "reward_funcs": [tiny.low_ids, IMPLICIT_REWARD],
        "train_dataset": prompts(),
        "output_dir": output_dir,
        "dpo_args": dpo_args(),
        "policy_args": PPOConfig(**policy_settings(reward_weights=[1.0, 0.1])),
        "pair_settings": {"num_generations": 4, "truncated": "keep", "prompts": 12},
        "peft_config": lora(),
        "processing_class": tiny.tokenizer(),
        "fit_critic": 1,
        "held_out": prompts(6),
        "held_out_samples": 2,
        **overrides,
    }
    return DPOThenPPO(**settings)


if __name__ == "__main__":
    schedule(sys.argv[1], rounds=2).train()
    tiny.leave()
