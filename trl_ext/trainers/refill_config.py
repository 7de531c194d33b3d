"""
The arguments of [`~trl_ext.GRPOConfig`] that say how `rollout_selection="refill"` chooses its prompts.
"""

from dataclasses import dataclass, field
from typing import Any

from ..errors import require


@dataclass
class RefillArguments:
    """
    How groups without variance are replaced by groups of new prompts.

    Args:
        max_refill_rounds (`int`, *optional*, defaults to `10`):
            Largest number of rounds of generation that `"refill"` adds to a generation batch. If groups without
            variance are left after that, they are replaced by copies. If no group has variance, the batch is used as
            TRL would use it.
        refill_draws (`str`, *optional*, defaults to `"blind"`):
            How `"refill"` chooses its prompts. `"blind"`: it takes those that the loader deals, and for refilling the
            next ones of a shuffled stream, as in the DAPO paper. `"informed"`: it takes those whose groups probably
            have variance, according to earlier groups of the same prompt and of similar prompts. Dealt prompts whose
            groups probably have none are replaced before anything is generated for them, and return in a later pass.
        prompt_features (`str`, *optional*, defaults to `"hidden_states"`):
            What `"informed"` reads from a prompt itself. `"hidden_states"`: its length, what the policy's middle layer
            makes of it, and the value that PPO's value head gives it. From these a regression learns pass rates during
            the run. This takes a forward pass over the prompt. `"none"`: nothing.
        similar_prompts_columns (`list[str]`, *optional*):
            Columns by which `"informed"` recognises similar prompts, too: a difficulty, a topic, a pass rate. Numbers
            are divided at deciles. `None`: as far as columns say, all prompts are similar.
        refill_value (`str`, *optional*, defaults to `"live"`):
            What `"informed"` looks for. `"live"`: groups that probably have variance. `"signal"`: groups whose rewards
            probably vary much, which are those of prompts that are solved half of the time. The two differ in large
            groups, of which nearly all have variance.
        refill_exploration (`float`, *optional*, defaults to `0.1`):
            Share of the prompts, in [0, 1], that `"informed"` chooses at random, so that no prompt is given up for
            good.
    """

    max_refill_rounds: int = field(
        default=10,
        metadata={"help": "Largest number of rounds of generation that 'refill' adds to a generation batch."},
    )
    refill_draws: str = field(
        default="blind",
        metadata={
            "help": "How 'refill' chooses its prompts: 'blind', or 'informed' by earlier groups of similar prompts."
        },
    )
    similar_prompts_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns by which 'informed' recognises similar prompts: a difficulty, a topic, a length."},
    )
    refill_exploration: float = field(
        default=0.1,
        metadata={"help": "Share of the prompts, in [0, 1], that 'informed' chooses at random."},
    )
    prompt_features: str = field(
        default="hidden_states",
        metadata={"help": "What 'informed' reads from a prompt itself: the policy's 'hidden_states', or 'none'."},
    )
    refill_value: str = field(
        default="live",
        metadata={"help": "What 'informed' looks for: groups that are probably 'live', or with much 'signal'."},
    )


# What has an effect with informed draws only
INFORMED_ONLY = ("similar_prompts_columns", "prompt_features", "refill_value")


def check_refilling(config: Any) -> None:
    """Raises `ValueError` for arguments of a [`~trl_ext.GRPOConfig`] that have no effect or are out of range."""
    informed = config.refill_draws == "informed"
    for name in INFORMED_ONLY:
        value = getattr(config, name)
        require(
            informed or not value or value == RefillArguments.__dataclass_fields__[name].default,
            f"{name}={value!r} has no effect with refill_draws={config.refill_draws!r}. Set refill_draws='informed', "
            f"or leave {name} out.",
        )
    require(
        not informed or config.rollout_selection == "refill",
        f"refill_draws='informed' has no effect with rollout_selection={config.rollout_selection!r}. Set "
        "rollout_selection='refill', or leave refill_draws out.",
    )
    require(
        0 <= config.refill_exploration <= 1,
        f"refill_exploration={config.refill_exploration} is a share of the prompts: choose it in [0, 1].",
    )
    require(
        config.max_refill_rounds >= 1,
        f"max_refill_rounds={config.max_refill_rounds} must be at least 1. To switch refilling off, set "
        "rollout_selection='all' or 'duplicate'.",
    )
