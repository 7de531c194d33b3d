"""
Decides which groups of a generation batch are trained on. `SELECTIONS` is the table of the ways to do that. The
decisions depend on rewards that are the same on every rank; there are no collectives and no tensors of the batch.

A *group* is the G completions of one prompt. It is *live* if its outcome rewards differ, and *dead* if they are all
equal, because then all of its group-relative advantages are zero (DAPO, https://huggingface.co/papers/2503.14476,
section 3.2).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import require


# Largest difference of outcome rewards, in units of their magnitude, that is taken for rounding
ROUNDING = 1e-6


def outcome_rewards(rewards: torch.Tensor, weights: torch.Tensor, is_outcome: torch.Tensor) -> torch.Tensor:
    """
    The rewards by which groups are judged live or dead: the weighted sum of the outcome functions alone, so that
    rewards for length or format don't make a group live whose completions are all right or all wrong.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of N completions by F functions, NaN = not applicable.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        is_outcome (`torch.Tensor` of shape `(F,)`):
            For each function, whether it is an outcome function.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN where no outcome function applies.
    """
    outcome = rewards[:, is_outcome]
    total = (outcome * weights[is_outcome].to(outcome)).nansum(dim=1)
    return total.masked_fill(outcome.isnan().all(dim=1), torch.nan)


def only_scored(rewards: torch.Tensor, is_outcome: torch.Tensor) -> torch.Tensor:
    """
    Rewards in which a completion that no outcome function can score has no reward at all. A punishment for its length
    would otherwise be its whole reward, and 0 that of a wrong answer.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of N completions by F functions, NaN = not applicable.
        is_outcome (`torch.Tensor` of shape `(F,)`):
            For each function, whether it is an outcome function. If none is, the rewards stay as they are.

    Returns:
        `torch.Tensor` of shape `(N, F)`.
    """
    if not is_outcome.any():
        return rewards
    unscored = rewards[:, is_outcome].isnan().all(dim=1)
    return rewards.masked_fill(unscored.unsqueeze(1), torch.nan)


def has_variance(outcome: torch.Tensor) -> torch.Tensor:
    """
    Which groups are live: those whose largest outcome reward is larger than their smallest by more than rounding. NaN
    is ignored.

    A weighted sum of equal rewards can differ by a rounding of float32, 6e-8 of its magnitude, and such a difference
    teaches nothing. Differences up to `ROUNDING` times the magnitude (of at least 1) count as none. A standard
    deviation compared with zero would let the rounding of a mean decide as well.

    Args:
        outcome (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards by group.

    Returns:
        `torch.Tensor` of shape `(P,)`, boolean.
    """
    highest = outcome.nan_to_num(nan=-math.inf).amax(dim=1)
    lowest = outcome.nan_to_num(nan=math.inf).amin(dim=1)
    magnitude = torch.maximum(highest.abs(), lowest.abs()).clamp(min=1.0, max=torch.finfo(outcome.dtype).max)
    return highest - lowest > ROUNDING * magnitude


def census(outcome: torch.Tensor, success_threshold: float) -> dict[str, int]:
    """
    Count the groups, the dead ones, and the dead ones whose completions are all right or all wrong.

    Args:
        outcome (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards by group, NaN = not applicable.
        success_threshold (`float`):
            A dead group is all right if its outcome reward is at least this, and all wrong if it is less.

    Returns:
        `dict[str, int]`: `generated`, `dead`, `all_right`, `all_wrong`. A dead group without any reward is neither all
        right nor all wrong.
    """
    dead = outcome[~has_variance(outcome)]
    reward = dead.nan_to_num(nan=-math.inf).amax(dim=1) if len(dead) else dead.new_zeros(0)
    known = reward > -math.inf
    return {
        "generated": len(outcome),
        "dead": len(dead),
        "all_right": int((known & (reward >= success_threshold)).sum()),
        "all_wrong": int((known & (reward < success_threshold)).sum()),
    }


@dataclass
class AcceptanceRate:
    """
    The recent share of generated groups that are live. It decides how many prompts to draw for refilling.

    Args:
        live, generated (`float`):
            Discounted counts of live groups and of all groups. They start at one live group of two, a guess which the
            first generation batch outweighs.
        discount (`float`):
            Factor on the earlier counts at each observation, because the rate changes with the policy.
    """

    live: float = 1.0
    generated: float = 2.0
    discount: float = 0.8

    def observe(self, live: int, generated: int) -> None:
        """Count a round of generation."""
        self.live = self.discount * self.live + live
        self.generated = self.discount * self.generated + generated

    @property
    def rate(self) -> float:
        return self.live / self.generated

    def draws_for(self, missing: int, at_most: int, multiple_of: int) -> int:
        """
        How many prompts to generate for, so that about `missing` of their groups are live.

        Args:
            missing (`int`):
                Number of slots to fill.
            at_most (`int`):
                Prompts of one generation batch. A round may not be larger, because of memory.
            multiple_of (`int`):
                The result is a multiple of this, so that every rank generates the same number of completions.
        """
        # A rate of 0 would divide by zero; `at_most` limits the result in any case
        wanted = math.ceil(missing / max(self.rate, 1e-6))
        wanted = min(wanted, at_most)
        return min(math.ceil(wanted / multiple_of) * multiple_of, at_most // multiple_of * multiple_of)


@dataclass(frozen=True)
class GroupRef:
    """Group number `group` of round number `round` of a generation batch, both counted from 0."""

    round: int
    group: int


def _home_first(candidates: list[Any], home: int, home_of: dict[Any, int]) -> Any:
    """Remove and return the first candidate whose rank is `home`, or the first of all if there is none."""
    on_same_rank = [candidate for candidate in candidates if home_of[candidate] == home]
    chosen = (on_same_rank or candidates)[0]
    candidates.remove(chosen)
    return chosen


@dataclass
class GroupSelection:
    """
    Which group is in each slot of a generation batch, and which are trained on as copies of others.

    A *slot* is the place of one group, or of a part of a group that takes several slots
    ([`trl_ext.rollouts.groups`]). Slots are numbered over all ranks: slot s holds the batch's rows s·G to
    (s+1)·G − 1, a row for each completion. A live group never leaves its slot, so that rows move between ranks only if
    a dead group is replaced.

    Args:
        live (`list[bool]`):
            For each group of the first round, whether it is live.
        num_generations (`int`):
            G, the size of a group.
        rows_per_rank (`int`):
            Number of the batch's rows on each rank.

    Attributes:
        live (`list[bool]`):
            For each slot, whether the group in it is live.
        slots (`list[GroupRef]`):
            For each slot, the group in it.
        sources (`list[int]`):
            For each slot, the slot whose group is trained on in its place: itself, or a different one if it is a copy.
        surplus (`int`):
            Number of live groups for which no slot was left.
    """

    live: list[bool]
    num_generations: int
    rows_per_rank: int
    slots: list[GroupRef] = field(init=False)
    sources: list[int] = field(init=False)
    surplus: int = 0

    def __post_init__(self) -> None:
        self.live = list(self.live)
        self.slots = [GroupRef(0, group) for group in range(len(self.live))]
        self.sources = list(range(len(self.live)))

    @property
    def dead_slots(self) -> list[int]:
        """Slots with a dead group."""
        return [slot for slot, live in enumerate(self.live) if not live]

    def rank_of(self, slot: int) -> int:
        """The rank of a slot's first row. (A group may span ranks.)"""
        return slot * self.num_generations // self.rows_per_rank

    def fill(self, round_index: int, live: list[bool], rows_per_rank: int) -> None:
        """
        Put the live groups of a further round into the slots of dead ones, if possible on the rank that generated
        them.

        Args:
            round_index (`int`):
                Number of the round, from 1.
            live (`list[bool]`):
                For each of its groups, whether it is live.
            rows_per_rank (`int`):
                Number of the round's rows on each rank.
        """
        dead = self.dead_slots
        live_groups = [group for group, is_live in enumerate(live) if is_live]
        # The number of ranks may decide which slot a group gets, but not which groups are kept
        kept = live_groups[: len(dead)]
        self.surplus += len(live_groups) - len(kept)
        home_of = {group: group * self.num_generations // rows_per_rank for group in kept}
        for slot in dead[: len(kept)]:
            group = _home_first(kept, self.rank_of(slot), home_of)
            self.slots[slot], self.live[slot] = GroupRef(round_index, group), True

    def duplicate(self, generator: torch.Generator) -> int:
        """
        Train on random copies of live groups in the slots of dead ones (DUPO,
        https://huggingface.co/papers/2507.02592, section 4.2). Groups are drawn without replacement until each was
        drawn once, and with replacement after that.

        Args:
            generator (`torch.Generator`):
                Generator of the draws, in the same state on every rank.

        Returns:
            `int`: how many slots are trained on copies now. 0 if no group is live, because nothing can be copied then.
        """
        dead = self.dead_slots
        # Sorted by origin and not by slot, because the slot of a refilled group may depend on the number of ranks
        live = sorted(
            (slot for slot, is_live in enumerate(self.live) if is_live),
            key=lambda slot: (self.slots[slot].round, self.slots[slot].group),
        )
        if not dead or not live:
            return 0
        once = [live[i] for i in torch.randperm(len(live), generator=generator).tolist()][: len(dead)]
        more = torch.randint(len(live), (len(dead) - len(once),), generator=generator).tolist()
        drawn = once + [live[i] for i in more]
        home_of = {slot: self.rank_of(slot) for slot in live}
        for slot in dead:
            self.sources[slot] = _home_first(drawn, self.rank_of(slot), home_of)
        return len(dead)

    def rows(self, slots: list[int]) -> list[int]:
        """The batch's rows in these slots, group by group."""
        size = self.num_generations
        return [slot * size + i for slot in slots for i in range(size)]


@dataclass(frozen=True)
class FurtherRound:
    """
    A round of generation after the first.

    Args:
        index (`int`):
            Number of the round, from 1.
        live (`list[bool]`):
            For each of its groups, whether it is live.
        rows_per_rank (`int`):
            Number of its rows on each rank.
    """

    index: int
    live: list[bool]
    rows_per_rank: int


def duplicate(selection: GroupSelection, rounds: Iterable[FurtherRound], generator: torch.Generator) -> None:
    """DUPO: train on copies of live groups in the slots of dead ones, see [`GroupSelection.duplicate`]."""
    selection.duplicate(generator)


def refill(selection: GroupSelection, rounds: Iterable[FurtherRound], generator: torch.Generator) -> None:
    """DAPO's dynamic sampling: fill the slots of dead groups with groups of new prompts, then with copies."""
    for further in rounds:
        selection.fill(further.index, further.live, further.rows_per_rank)
    selection.duplicate(generator)


@dataclass(frozen=True)
class RolloutSelection:
    """
    An entry of `SELECTIONS`: the function and what it needs.

    Args:
        fill (`Callable`, *optional*):
            Replaces dead groups in a [`GroupSelection`]. Its further arguments are an iterable of further rounds, each
            of which is generated when it is asked for, until no slot is dead; and a generator in the same state on
            every rank. `None`: all groups are trained on as they were generated.
        draws_prompts (`bool`):
            Whether `fill` asks for further rounds, for which new prompts are drawn from the data set.
        mostly_copies (`bool`):
            Whether dead groups are usually replaced by copies. Then copies are computed once, although metrics are
            taken over fewer rows for that.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    fill: Callable[[GroupSelection, Iterable[FurtherRound], torch.Generator], None] | None = None
    draws_prompts: bool = False
    mostly_copies: bool = False

    def __post_init__(self) -> None:
        require(
            self.fill is not None or not (self.draws_prompts or self.mostly_copies),
            "A selection without `fill` trains on all groups as they were generated, so that it can't have "
            "draws_prompts or mostly_copies. Give it a function `fill`, or leave them out.",
        )


# A new selection is a function above and an entry here.
SELECTIONS = {
    "all": RolloutSelection(),
    "refill": RolloutSelection(refill, draws_prompts=True),
    "duplicate": RolloutSelection(duplicate, mostly_copies=True),
}
