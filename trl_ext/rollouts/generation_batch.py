"""
What the hooks of a trainer hand to each other while a generation batch is made: from its data set rows to TRL's
tensors.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from .groups import Groups, prompts_of_slots
from .rollout import ScoredRound
from .selection import GroupSelection


Rows = list[dict[str, Any]]


@dataclass
class GenerationBatch:
    """
    A generation batch that is being made, or a single round of generation. A trainer creates one when a batch begins
    and drops it when TRL's tensors are ready.

    Args:
        rows (`list[dict]`):
            Data set rows for which this rank generates, one for each completion.
        training (`bool`):
            Whether this is a whole batch of training, and not of evaluation or a single round.
        round_only (`bool`):
            Whether this is a single round, for which TRL's method is left as soon as the completions are scored.
        further (`bool`):
            Whether this is a further round of a batch that already has one.
        credits_late (`bool`):
            Whether the old policy's pass over the batch is left out, and the first pass of the loss stands for it.
        group_rows (`list[dict]`):
            Data set rows of all ranks, one for each slot. Empty if the prompt chooser doesn't need them.
        replaced (`int`):
            How many of the prompts that the loader dealt were replaced.
        rounds (`list[ScoredRound]`):
            The rounds of generation. Empty if groups are not selected.
        prompts (`list[list[int]]`):
            For each round that was observed, the number of each slot's prompt, counted over all rounds.
        selection ([`~trl_ext.rollouts.selection.GroupSelection`], *optional*):
            Which groups fill the slots of the batch. `None` if groups are not selected.
        rewards (`torch.Tensor` of shape `(N, F)`, *optional*):
            Rewards of all ranks for the completions that TRL logs.
        step_rewards (`list[dict]`):
            For each of this rank's completions that are trained on, the step rewards by column of `rewards`.
        logged_prompts (`list`, *optional*):
            This rank's prompts to log, if TRL was given different ones to render.
        extras (`tuple[torch.Tensor, ...]`):
            Tensors that the policy's pass over the batch returned after TRL's three.
    """

    rows: Rows = field(default_factory=list)
    training: bool = False
    round_only: bool = False
    further: bool = False
    credits_late: bool = False
    group_rows: Rows = field(default_factory=list)
    replaced: int = 0
    rounds: list[ScoredRound] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    selection: GroupSelection | None = None
    rewards: torch.Tensor | None = None
    step_rewards: list[dict[int, Any]] = field(default_factory=list)
    logged_prompts: list[Any] | None = None
    extras: tuple[torch.Tensor, ...] = ()

    def count_prompts(self, slots: int, rows: Rows) -> list[int]:
        """Count those of a round. Returns for each of its slots, whose `rows` may be unknown, its prompt's number."""
        numbers = prompts_of_slots(rows) or list(range(slots))
        before = sum(len(set(of_round)) for of_round in self.prompts)
        self.prompts.append([before + number for number in numbers])
        return numbers

    def generated_groups(self, num_generations: int) -> Groups:
        """The groups of all rounds; `num_generations` is the number of completions in a slot."""
        return Groups(list(chain.from_iterable(self.prompts)), num_generations)

    @property
    def selected_prompts(self) -> list[int]:
        """For each slot of the selection, the number of its prompt."""
        return [] if self.selection is None else [self.prompts[ref.round][ref.group] for ref in self.selection.slots]

    @property
    def kept_groups(self) -> int:
        """How many groups of the selection are live."""
        live = [] if self.selection is None else self.selection.live
        return len({prompt for prompt, is_live in zip(self.selected_prompts, live, strict=True) if is_live})
