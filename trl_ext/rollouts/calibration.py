"""
Makes probabilities mean what they say: a correction that is learned online, and how far off the corrected ones are.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metric_keys import CALIBRATION_ERROR, RELIABILITY
from .pass_rates import Floats, LogisticPosterior


BINS = 10
# Weight of a prediction after so many further ones is 1 / e
REMEMBERED = 500.0
# Share of what the correction learned that is left after a tick
MEMORY = 0.98
# Precision of the correction's weights before anything was observed
STIFFNESS = 10.0
CLIP = 1e-4


class Calibration:
    """
    Corrects probabilities by Platt's logistic regression, p' = σ(w₀ + w₁ logit p), whose w is learned from what
    happened, and shrunk to (0, 1), which is no correction. Keeps a reliability curve: over equally wide bins of p',
    how many predictions there were lately, their mean, and how often they came true.

    Attributes:
        curve (`list[tuple[float, float, float]]`):
            For each of `BINS` bins: the faded number of predictions, the sum of the predicted probabilities, and the
            number that came true.
    """

    def __init__(self) -> None:
        self._correction = LogisticPosterior(np.array([0.0, 1.0]), STIFFNESS * np.eye(2), MEMORY)
        self.curve = [(0.0, 0.0, 0.0)] * BINS

    @property
    def error(self) -> float:
        """Expected calibration error of late predictions: the mean over bins of |mean p' − share that came true|."""
        total = sum(count for count, _, _ in self.curve)
        return sum(abs(predicted - true) for _, predicted, true in self.curve) / total if total else 0.0

    def metrics(self) -> dict[str, float]:
        """The error, and the curve by bins that had predictions, as [`read_curve`] reads it from a log."""
        found = {CALIBRATION_ERROR: self.error}
        for place, (count, predicted, true) in enumerate(self.curve):
            if count:
                means = {"groups": count, "predicted": predicted / count, "came_true": true / count}
                found |= {f"{RELIABILITY}{place}/{name}": value for name, value in means.items()}
        return found

    def __call__(self, probability: float) -> float:
        """p', the corrected probability."""
        return float(self._correction.rates(_inputs([probability]))[0])

    def tick(self) -> None:
        self._correction.tick()

    def observe(self, probabilities: Sequence[float], came_true: Sequence[float]) -> None:
        """
        Score predictions p by what happened, then learn from it. `came_true` is 1 or 0, or a share where a rate was
        predicted.
        """
        if not probabilities:
            return
        fade, x = math.exp(-1 / REMEMBERED), _inputs(probabilities)
        for predicted, true in zip(self._correction.rates(x).tolist(), came_true, strict=True):
            place = min(int(predicted * BINS), BINS - 1)
            self.curve = [(fade * n, fade * p, fade * t) for n, p, t in self.curve]
            n, p, t = self.curve[place]
            self.curve[place] = (n + 1, p + predicted, t + true)
        self._correction.observe(x, np.array(came_true, dtype=float), np.ones(len(x)))

    def state_dict(self) -> dict[str, Any]:
        return {"curve": list(self.curve), "correction": self._correction.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self.curve = [tuple(entry) for entry in state["curve"]]
        self._correction.load_state_dict(state["correction"])


def read_curve(log_history: Sequence[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """
    The curve that [`Calibration.metrics`] logged last: for each bin that had predictions, the faded number of groups,
    the mean of the predicted probabilities, and the share that came true. Empty if nothing was predicted.
    """
    logged = [entry for entry in log_history if any(key.startswith(RELIABILITY) for key in entry)]
    keys = [[f"{RELIABILITY}{place}/{name}" for name in ("groups", "predicted", "came_true")] for place in range(BINS)]
    return [(logged[-1][n], logged[-1][p], logged[-1][t]) for n, p, t in keys if logged and n in logged[-1]]


def _inputs(probabilities: Sequence[float]) -> Floats:
    """(1, logit p) `(N, 2)`."""
    p = np.clip(np.array(probabilities), CLIP, 1 - CLIP)
    return np.stack([np.ones(len(p)), np.log(p / (1 - p))], axis=1)
