"""
How likely a prompt is solved, from numbers that describe it: a logistic regression that learns online, and how far its
predictions can be trusted.

Everything is computed in float64 on the CPU, in closed form or by a fixed number of Newton steps, so that it is the
same on every rank and after a resume.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


Floats = NDArray[np.float64]

NEWTON_STEPS = 6
# The largest change of log-odds in a Newton step: a full step can overshoot where rates are near 0 or 1
LARGEST_STEP = 4.0
# Standard deviation of the log-odds of a new prompt, and of all prompts together, before anything was observed
PRIOR_SPREAD = 2.0
# Share of what is known of the spread of pass rates that is left after a tick. Early predictions are worse than later
# ones, whatever the memory of the weights.
SPREAD_MEMORY = 0.9
# It starts as if this many prompts had shown that of the uniform distribution
PRIOR_PROMPTS = 4.0
# Bounds of the correlation between completions of a prompt: Beta distributions with a + b of 50 and of 0.05
CORRELATION = (1 / 51, 1 / 1.05)


def sigmoid(log_odds: Floats) -> Floats:
    """1 / (1 + e^−x), by a form that doesn't overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * log_odds)))


def _float64(values: Any) -> Floats:
    """What `np.linalg` returns, whose type says less than is true."""
    return np.asarray(values, dtype=np.float64)


class LogisticPosterior:
    """
    Weights w of a logistic regression, P(success) = σ(w·x), as they are known so far: N(mean, precision⁻¹), updated by
    Laplace's approximation. With every tick it moves towards the prior, so that old evidence is forgotten.

    Args:
        mean (`np.ndarray` of shape `(D,)`), precision (`np.ndarray` of shape `(D, D)`):
            Of the prior.
        memory (`float`):
            Share of the evidence that is left after a tick.
    """

    def __init__(self, mean: Floats, precision: Floats, memory: float) -> None:
        self.memory = memory
        self._prior_mean, self._prior = mean, precision
        self._set(mean, precision)

    def _set(self, mean: Floats, precision: Floats) -> None:
        self._mean, self._precision = mean, precision
        self._covariance = _float64(np.linalg.inv(precision))

    def tick(self) -> None:
        """What was learned fades by the factor `memory`."""
        faded, prior = self.memory * self._precision, (1 - self.memory) * self._prior
        mean = np.linalg.solve(faded + prior, faded @ self._mean + prior @ self._prior_mean)
        self._set(_float64(mean), faded + prior)

    def rates(self, x: Floats) -> Floats:
        """
        P(success) `(N,)` for inputs `(N, D)`. The mean over the posterior of w is MacKay's approximation, log-odds /
        √(1 + π s² / 8) with their variance s².
        """
        variance = ((x @ self._covariance) * x).sum(axis=1)
        return sigmoid(x @ self._mean / np.sqrt(1 + math.pi / 8 * variance))

    def observe(self, x: Floats, successes: Floats, tried: Floats) -> None:
        """Learn from binomial observations at `(N, D)`: `(N,)` successes in `(N,)` trials, which may be fractions."""
        mean = self._mean
        for _ in range(NEWTON_STEPS):
            p = sigmoid(x @ mean)
            gradient = self._precision @ (mean - self._mean) + x.T @ (tried * p - successes)
            step = np.linalg.solve(self._curvature(x, p, tried), gradient)
            mean = mean - step * min(1.0, LARGEST_STEP / max(float(np.abs(x @ step).max(initial=0.0)), 1e-12))
        self._set(mean, self._curvature(x, sigmoid(x @ mean), tried))

    def _curvature(self, x: Floats, p: Floats, tried: Floats) -> Floats:
        return self._precision + (x.T * (tried * p * (1 - p))) @ x

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned. The tensors are not changed when more is."""
        return {"mean": torch.from_numpy(self._mean), "precision": torch.from_numpy(self._precision)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self._set(*(state[name].cpu().numpy() for name in ("mean", "precision")))


class PassRateModel:
    """
    The pass rate p of a prompt with features x: p ~ Beta(m c, (1 − m) c), where logit m = w·(1, x).

    The weights w have the prior N(0, `PRIOR_SPREAD`²) for the constant and each of the first `plain` features, and
    N(0, `PRIOR_SPREAD`² / (F − plain)) for each of the others. Features must have a variance of about 1. The k passes
    of n completions count as binomial, divided by the inflation of their variance, 1 + (n − 1) ρ with ρ = 1 / (1 + c)
    (quasi-likelihood): completions of a prompt are alike in what x doesn't show.

    ρ = E[(p − m)²] / E[m (1 − m)] comes from the groups themselves, predicted before they were learned from. Without
    bias, (p − m)² is k (k − 1) / (n (n − 1)) − 2 m k / n + m². So c also says how wrong m is on average.

    Args:
        size (`int`):
            F, the number of features.
        plain (`int`):
            Number of features, from the first on, that may be decisive by themselves.
        memory (`float`):
            Share of the evidence that is left after a tick.
    """

    def __init__(self, size: int, plain: int, memory: float) -> None:
        rest = size - plain
        precision = np.diag([1.0] * (1 + plain) + [float(rest)] * rest) / PRIOR_SPREAD**2
        self._weights = LogisticPosterior(np.zeros(size + 1), precision, memory)
        # Faded sums of (p − m)² and m (1 − m), and their prior
        self._squares, self._scale = self._prior = PRIOR_PROMPTS / 12, PRIOR_PROMPTS / 4

    @property
    def correlation(self) -> float:
        """ρ, of two completions for the same prompt."""
        low, high = CORRELATION
        return min(max(self._squares / self._scale, low), high)

    @property
    def concentration(self) -> float:
        """c, the a + b of the Beta distribution."""
        return 1 / self.correlation - 1

    def tick(self) -> None:
        """What was learned fades."""
        self._weights.tick()
        self._squares, self._scale = (
            SPREAD_MEMORY * value + (1 - SPREAD_MEMORY) * prior
            for value, prior in zip((self._squares, self._scale), self._prior, strict=True)
        )

    def rates(self, features: Floats) -> Floats:
        """m `(N,)` for features `(N, F)`."""
        return self._weights.rates(_with_constant(features))

    def observe(self, features: Floats, passes: Floats, tried: Floats) -> None:
        """
        Learn from groups.

        Args:
            features (`np.ndarray` of shape `(N, F)`):
                Of their prompts.
            passes, tried (`np.ndarray` of shape `(N,)`):
                k passes in n completions. A single completion says nothing of ρ.
        """
        m = self.rates(features)
        pairs = passes * (passes - 1) / np.maximum(tried * (tried - 1), 1)
        inflation = 1 + (tried - 1) * self.correlation
        several = tried > 1
        self._squares += float((pairs - 2 * m * passes / tried + m**2)[several].sum())
        self._scale += float((m * (1 - m))[several].sum())
        self._weights.observe(_with_constant(features), passes / inflation, tried / inflation)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned."""
        return {"weights": self._weights.state_dict(), "squares": self._squares, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        self._weights.load_state_dict(state["weights"])
        self._squares, self._scale = state["squares"], state["scale"]


def _with_constant(features: Floats) -> Floats:
    return np.concatenate([np.ones((len(features), 1)), features], axis=1)
