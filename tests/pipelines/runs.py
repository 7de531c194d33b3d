"""Short runs of the schedule, and what tests look at in them."""

from typing import Any

import tiny
import torch
from peft import load_peft_weights
from pipelines.dpo_then_ppo_worker import dpo_args, pairs, policy_settings, schedule

from trl_ext import PPOConfig
from trl_ext.pipelines.dpo_then_ppo import DPOThenPPO


def adapter(folder: Any) -> dict[str, torch.Tensor]:
    # Copies, because what is read is the file itself, which may be written anew
    return {name: weight.clone() for name, weight in load_peft_weights(str(folder), device="cpu").items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


class Looks:
    """What `prepare` is called with: the stage, and what `look` says of its trainer."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, {}

    def __call__(self, stage: str, trainer: Any) -> None:
        self.seen[stage] = self.look(trainer)


def adapter_of(trainer: Any, name: str = "default") -> dict[str, torch.Tensor] | None:
    if name not in trainer.model.peft_config:
        return None
    weights = trainer.model.state_dict().items()
    return {key.replace(f".{name}.", "."): weight.clone() for key, weight in weights if f".{name}." in key}


def short(output_dir: Any, **overrides: Any) -> DPOThenPPO:
    """Given pairs, two steps a stage, nothing measured."""
    settings: dict[str, Any] = {
        "pairs": pairs(),
        "reward_funcs": tiny.low_ids,
        "dpo_args": dpo_args(max_steps=2),
        "policy_args": PPOConfig(**policy_settings(max_steps=2)),
        "fit_critic": 0,
        "held_out": None,
        **overrides,
    }
    return schedule(output_dir, **settings)
