"""
What one generation batch carries between the hooks of a trainer, from the rows that are generated for to TRL's
tensors.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .rollout import ScoredRound
from .selection import GroupSelection


Rows = list[dict[str, Any]]


@dataclass
class GenerationBatch:
    """
    A generation batch, or one further round of it, in the making. A trainer makes one when a batch begins, and drops
    it when TRL's tensors are ready.

    Args:
        rows (`list[dict]`):
            Rows of this rank that are generated for, one for each completion.
        training (`bool`):
            Whether it is trained on.
        round_only (`bool`):
            Whether TRL's method is left as soon as the completions are scored.
        further (`bool`):
            Whether it is a further round of another batch.
        credits_late (`bool`):
            Whether the first pass of the loss stands for the old policy's.
        group_rows (`list[dict]`):
            The rows of all ranks, one for each group; empty where nobody needs them.
        replaced (`int`):
            How many of the prompts that the loader dealt were replaced.
        rounds (`list[ScoredRound]`):
            Rounds of generation, where groups are selected.
        selection ([`~trl_ext.rollouts.selection.GroupSelection`], *optional*):
            What stands in its slots.
        rewards (`torch.Tensor` of shape `(N, F)`, *optional*):
            Rewards of the batch that TRL logs, of all ranks.
        step_rewards (`list[dict]`):
            Rewards by step, for each row of this rank that is trained on: by column of the rewards.
        logged_prompts (`list`, *optional*):
            The prompts to log, where TRL was given different ones to render.
        extras (`tuple[torch.Tensor, ...]`):
            What the policy's pass over the batch gave beside TRL's three tensors.
    """

    rows: Rows = field(default_factory=list)
    training: bool = False
    round_only: bool = False
    further: bool = False
    credits_late: bool = False
    group_rows: Rows = field(default_factory=list)
    replaced: int = 0
    rounds: list[ScoredRound] = field(default_factory=list)
    selection: GroupSelection | None = None
    rewards: torch.Tensor | None = None
    step_rewards: list[dict[int, Any]] = field(default_factory=list)
    logged_prompts: list[Any] | None = None
    extras: tuple[torch.Tensor, ...] = ()
