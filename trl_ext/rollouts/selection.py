"""
Which groups of a generation batch are trained on, and the table of selections: `SELECTIONS`. Pure decisions on
rewards that every rank sees alike: no collectives, no tensors of the batch.

A *group* is the G completions of one prompt. It is *live* if its outcome rewards differ, *dead* if they are all equal:
then every group-relative advantage is zero (DAPO, https://huggingface.co/papers/2503.14476, section 3.2).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import require


def outcome_rewards(rewards: torch.Tensor, weights: torch.Tensor, is_outcome: torch.Tensor) -> torch.Tensor:
    """
    The reward by which a group is judged: the weighted sum of the outcome functions only, so that length or format
    shaping doesn't make a solved group look undecided.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`):
            NaN = not applicable.
        weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        is_outcome (`torch.Tensor` of shape `(F,)`):
            Which functions count.

    Returns:
        `torch.Tensor` of shape `(N,)`: NaN where no outcome function applies.
    """
    outcome = rewards[:, is_outcome]
    total = (outcome * weights[is_outcome].to(outcome)).nansum(dim=1)
    return total.masked_fill(outcome.isnan().all(dim=1), torch.nan)


def has_variance(outcome: torch.Tensor) -> torch.Tensor:
    """
    Which groups are live: their largest outcome is not their smallest, exactly. NaN is left out.

    A standard deviation compared with zero would let rounding decide; max == min does not.

    Args:
        outcome (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards by group.

    Returns:
        `torch.Tensor` of shape `(P,)`, boolean.
    """
    highest = outcome.nan_to_num(nan=-math.inf).amax(dim=1)
    lowest = outcome.nan_to_num(nan=math.inf).amin(dim=1)
    return highest > lowest


def census(outcome: torch.Tensor, success_threshold: float) -> dict[str, int]:
    """
    Count groups by what became of them.

    Args:
        outcome (`torch.Tensor` of shape `(P, G)`):
            Outcome rewards by group.
        success_threshold (`float`):
            A constant outcome at or above it is "all right", below it "all wrong".

    Returns:
        `dict[str, int]`: `generated`, `dead`, `all_right`, `all_wrong`. A group without any reward is only dead.
    """
    dead = outcome[~has_variance(outcome)]
    level = dead.nan_to_num(nan=-math.inf).amax(dim=1) if len(dead) else dead.new_zeros(0)
    known = level > -math.inf
    return {
        "generated": len(outcome),
        "dead": len(dead),
        "all_right": int((known & (level >= success_threshold)).sum()),
        "all_wrong": int((known & (level < success_threshold)).sum()),
    }


@dataclass
class AcceptanceRate:
    """
    The share of generated groups that are live, over the recent past: it says how many prompts to draw.

    Args:
        live, generated (`float`):
            Discounted counts. The start is one live group in two: a guess that one batch outweighs.
        discount (`float`):
            Weight of what was seen before, at each observation: the policy moves, and acceptance with it.
    """

    live: float = 1.0
    generated: float = 2.0
    discount: float = 0.8

    def observe(self, live: int, generated: int) -> None:
        self.live = self.discount * self.live + live
        self.generated = self.discount * self.generated + generated

    @property
    def rate(self) -> float:
        return self.live / self.generated

    def draws_for(self, missing: int, at_most: int, multiple_of: int) -> int:
        """
        How many prompts to generate for so that about `missing` of them are live.

        Args:
            missing (`int`):
                Slots to fill.
            at_most (`int`):
                The prompts of one generation batch: what memory was sized for.
            multiple_of (`int`):
                Prompts come in multiples of this, so that every rank gets equally many rows.
        """
        # At most `at_most` anyway: the floor only keeps the division finite.
        wanted = math.ceil(missing / max(self.rate, 1e-6))
        wanted = min(wanted, at_most)
        return min(math.ceil(wanted / multiple_of) * multiple_of, at_most // multiple_of * multiple_of)


@dataclass(frozen=True)
class GroupRef:
    """Group `group` of round `round` of a generation batch; round 0 is the batch that TRL's loader dealt."""

    round: int
    group: int


def _home_first(candidates: list[Any], home: int, home_of: dict[Any, int]) -> Any:
    """Take a candidate that already lives on rank `home`, or else the first."""
    at_home = [candidate for candidate in candidates if home_of[candidate] == home]
    chosen = (at_home or candidates)[0]
    candidates.remove(chosen)
    return chosen


@dataclass
class GroupSelection:
    """
    What stands in each slot of the generation batch, and which slot each slot is trained from.

    Slots are numbered over all ranks; slot s holds global rows s·G to (s+1)·G − 1. A live group never leaves its
    slot, so rows move between ranks only where a dead group is replaced.

    Args:
        live (`list[bool]`):
            Which groups of the batch as dealt are live.
        num_generations (`int`):
            G.
        rows_per_rank (`int`):
            Rows of the generation batch on each rank.
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
        return [slot for slot, live in enumerate(self.live) if not live]

    def rank_of(self, slot: int) -> int:
        """The rank of a slot's first row (a group may span ranks)."""
        return slot * self.num_generations // self.rows_per_rank

    def fill(self, round_index: int, live: list[bool], rows_per_rank: int) -> None:
        """
        Put the live groups of a further round into dead slots, on their own rank where one is free.

        Args:
            round_index (`int`):
                Number of the round, from 1.
            live (`list[bool]`):
                Which of its groups are live.
            rows_per_rank (`int`):
                Rows of that round on each rank.
        """
        dead = self.dead_slots
        found = [group for group, is_live in enumerate(live) if is_live]
        # Which groups are kept must not depend on the number of ranks; which slot they get may
        arrivals = found[: len(dead)]
        self.surplus += len(found) - len(arrivals)
        home_of = {group: group * self.num_generations // rows_per_rank for group in arrivals}
        for slot in dead[: len(arrivals)]:
            group = _home_first(arrivals, self.rank_of(slot), home_of)
            self.slots[slot], self.live[slot] = GroupRef(round_index, group), True

    def duplicate(self, generator: torch.Generator) -> int:
        """
        Train dead slots on random copies of live ones (DUPO, https://huggingface.co/papers/2507.02592, section 4.2):
        drawn without replacement as long as enough groups are left, with replacement after that.

        Args:
            generator (`torch.Generator`):
                Source of the draws, in the same state on every rank.

        Returns:
            `int`: how many slots hold copies now. 0 if nothing is live: there is nothing to copy.
        """
        dead = self.dead_slots
        # By origin, not by slot: where a refilled group was put may depend on the number of ranks
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
        """Global rows of slots, group by group."""
        size = self.num_generations
        return [slot * size + i for slot in slots for i in range(size)]


@dataclass(frozen=True)
class FurtherRound:
    """
    A round of generation after the first.

    Args:
        index (`int`):
            Its number, from 1.
        live (`list[bool]`):
            Which of its groups are live.
        rows_per_rank (`int`):
            Rows of the round on each rank.
    """

    index: int
    live: list[bool]
    rows_per_rank: int


def duplicate(selection: GroupSelection, rounds: Iterable[FurtherRound], generator: torch.Generator) -> None:
    """DUPO: copies of live groups in the slots of dead ones, see [`GroupSelection.duplicate`]."""
    selection.duplicate(generator)


def refill(selection: GroupSelection, rounds: Iterable[FurtherRound], generator: torch.Generator) -> None:
    """DAPO's dynamic sampling: groups of new prompts in the slots of dead ones; copies in what is left over."""
    for further in rounds:
        selection.fill(further.index, further.live, further.rows_per_rank)
    selection.duplicate(generator)


@dataclass(frozen=True)
class RolloutSelection:
    """
    An entry of `SELECTIONS`: the function, and what it needs.

    Args:
        fill (`Callable`, *optional*):
            Changes a [`GroupSelection`], given the further rounds of generation (made as they are asked for, and as
            long as slots are dead) and a generator in the same state on every rank. `None`: groups are trained on as
            they are dealt.
        draws_prompts (`bool`):
            Whether it asks for further rounds, so that new prompts are drawn from the data set.
        mostly_copies (`bool`):
            Whether dead slots hold copies as a rule, so that computing them once is worth metrics over fewer rows.

    Raises:
        ValueError: for an entry that is only half written.
    """

    fill: Callable[[GroupSelection, Iterable[FurtherRound], torch.Generator], None] | None = None
    draws_prompts: bool = False
    mostly_copies: bool = False

    def __post_init__(self) -> None:
        require(
            self.fill is not None or not (self.draws_prompts or self.mostly_copies),
            "A selection without `fill` trains on groups as they are dealt: it draws no prompts and makes no copies.",
        )


# A new selection is a function above and an entry here.
SELECTIONS = {
    "all": RolloutSelection(),
    "refill": RolloutSelection(refill, draws_prompts=True),
    "duplicate": RolloutSelection(duplicate, mostly_copies=True),
}
