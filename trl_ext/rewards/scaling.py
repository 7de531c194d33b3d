"""
The scale of rewards: a critic fits returns, and learns badly where they are large, tiny, or drift.
"""

import math
from dataclasses import dataclass


REWARD_SCALINGS = ("none", "batch", "running")
# Rewards that are all equal have no scale to divide by
SMALLEST_DEVIATION = 1e-8


@dataclass
class RunningScale:
    """
    Mean and deviation of all scores so far (Chan et al.'s pairwise update of Welford's).

    Args:
        count, mean, squares (`float`):
            Scores, their mean, and the sum of their squared distances to it.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: list[float]) -> None:
        """Take in the scores of a batch, of all ranks."""
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
        """Unbiased standard deviation; 1 as long as the scores have none."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return deviation if deviation > SMALLEST_DEVIATION else 1.0
