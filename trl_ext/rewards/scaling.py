"""
The scale of rewards. A critic predicts returns, and learns badly if they are very large, tiny, or drift.

A scaling says by what scores are divided. A new one is a function and an entry in [`REWARD_SCALINGS`].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


# Scores whose deviation is smaller than this are not divided
SMALLEST_DEVIATION = 1e-8


@dataclass
class RunningScale:
    """
    Mean and standard deviation of all scores so far (Chan et al.'s pairwise form of Welford's update).

    Args:
        count (`float`):
            Number of scores.
        mean (`float`):
            Their mean.
        squares (`float`):
            The sum of their squared distances to the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: list[float]) -> None:
        """Add the scores of a batch, gathered over all ranks."""
        if not scores:
            return
        size, mean = len(scores), math.fsum(scores) / len(scores)
        squares = math.fsum((score - mean) ** 2 for score in scores)
        distance, total = mean - self.mean, self.count + size
        self.mean += distance * size / total
        self.squares += squares + distance**2 * self.count * size / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Unbiased standard deviation; 1 as long as all scores are (nearly) equal."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return deviation if deviation > SMALLEST_DEVIATION else 1.0


# Returns the finite scores of a batch, gathered over all ranks. It is only called if they are needed.
Scores = Callable[[], list[float]]


def unscaled(scores: Scores, running: RunningScale, training: bool) -> float:
    """Scores stay as they are."""
    return 1.0


def deviation_of_batch(scores: Scores, running: RunningScale, training: bool) -> float:
    """Scores are divided by the standard deviation of their own batch."""
    batch = RunningScale()
    batch.update(scores())
    return batch.deviation


def running_deviation(scores: Scores, running: RunningScale, training: bool) -> float:
    """Scores are divided by the standard deviation of all scores of training so far, including these."""
    found = scores()
    if training:
        running.update(found)
    return running.deviation


# By the values of `reward_scaling`: from the scores of a batch, the running scale and whether the batch is of training
# (and not of evaluation) to what scores are divided by
REWARD_SCALINGS: dict[str, Callable[[Scores, RunningScale, bool], float]] = {
    "none": unscaled,
    "batch": deviation_of_batch,
    "running": running_deviation,
}
