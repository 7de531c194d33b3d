"""
In which batches several processes evaluate a data set, and one number for all of it from the numbers of its batches.

Processes that evaluate together need equally many rows. Where a data set doesn't divide, a distributed sampler repeats
rows from its beginning, which then count twice. Here a row that is repeated is repeated together with all rows of its
batch, equally often, so that every mean of the batch is the mean over distinct rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Sampler


@dataclass(frozen=True)
class EvaluationRound:
    """
    A batch of all processes together.

    Args:
        rows (`list[int]`):
            Indices of data set rows, the same number for each process, in the order of the processes.
        copies (`int`):
            How often each row is in it.
    """

    rows: list[int]
    copies: int = 1

    @property
    def distinct(self) -> int:
        """Number of rows that differ; they come first."""
        return len(self.rows) // self.copies

    def of_process(self, index: int, processes: int) -> list[int]:
        """The rows of one process."""
        each = len(self.rows) // processes
        return self.rows[index * each : (index + 1) * each]


def evaluation_rounds(
    order: Sequence[int], processes: int, batch_size: int, together: int = 1
) -> list[EvaluationRound]:
    """
    Deals rows so that no row counts more than another within a round, and every row is in one round.

    Args:
        order (`Sequence[int]`):
            Indices of data set rows, in the order in which they are evaluated.
        processes (`int`):
            Number of processes.
        batch_size (`int`):
            Most rows of a process in a round. (Exceeded if a single group doesn't fit.)
        together (`int`, *optional*, defaults to `1`):
            Rows of a group, which stay in one round. It divides the number of rows.

    Returns:
        `list[EvaluationRound]`: full ones; one that is smaller; then the rest, which is copied.
    """
    unit = math.lcm(processes, together)
    full = processes * batch_size // unit * unit
    rest, rounds = list(order), []
    while full and len(rest) >= unit:
        size = min(full, len(rest) // unit * unit)
        rounds.append(EvaluationRound(rest[:size]))
        rest = rest[size:]
    # What is left is less than a unit: too little for every process to get a different part of it
    copies, each = processes // math.gcd(processes, together), together // math.gcd(processes, together)
    size = max(batch_size // each, 1) * together
    for start in range(0, len(rest), size):
        rounds.append(EvaluationRound(rest[start : start + size] * copies, copies))
    return rounds


class BatchesOfProcess(Sampler[list[int]]):
    """
    A batch sampler: the part of one process in all rounds.

    Args:
        rounds (`list[EvaluationRound]`):
            The rounds of all processes.
        index, processes (`int`):
            This process, and the number of processes.
    """

    def __init__(self, rounds: list[EvaluationRound], index: int, processes: int) -> None:
        self.rounds = rounds
        self.index = index
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        return (round_.of_process(self.index, self.processes) for round_ in self.rounds)

    def __len__(self) -> int:
        return len(self.rounds)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """The mean of the values that are not NaN; `None` if there is none, or if none of them has a weight."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    if total == 0:
        return None
    first = known[0][0]
    if all(value == first for value, _ in known):
        return first  # without rounding: `num_tokens` is a count
    return sum(value * weight for value, weight in known) / total
