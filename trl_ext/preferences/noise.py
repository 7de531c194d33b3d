"""
Estimates how many labels of a set of preference pairs are wrong, from the margins of a scorer that wasn't trained on
them.

A scorer gives each pair a margin m = score(chosen) − score(rejected). If the margin contradicts the label, either the
label is wrong or the scorer is. Let a share ε of the labels be flipped, independently of the pair, and let the
log-odds that the scorer is right grow linearly with its margin. Then

    P(margin is positive | |m|) = (1 − ε) σ(b|m|) + ε σ(−b|m|) = ε + (1 − 2ε) σ(b|m|).

The first equation is a Bradley–Terry model in a noisy channel, as in robust DPO
(https://huggingface.co/papers/2403.00409, section 3); b calibrates a scorer that is over- or underconfident. Both
parameters are estimated by maximum likelihood: ε is determined by the rate at which the scorer contradicts labels
where it is confident, and b by its errors elsewhere. Confident learning (https://huggingface.co/papers/1911.00068)
also counts contradictions in confident cases, but it needs a threshold for what is confident, and takes the scorer's
own errors beyond that threshold for wrong labels.

Assumptions: the scorer has not seen the pair's label, and labels are flipped independently of how difficult a pair is.
Pairs without a clear true preference are not counted as noise. Pairs on which the scorer is confidently wrong, because
it can't judge their kind, are counted as noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from ..errors import require


# With fewer pairs, the interval, which is asymptotic, is not accurate
FEWEST_PAIRS = 50
# Single labels are judged only if the interval of the rate is at most this wide
WIDEST_INTERVAL = 0.25
# Robust DPO divides by 1 − 2ε
LARGEST_LABEL_SMOOTHING = 0.49


@dataclass(frozen=True)
class NoiseEstimate:
    """
    Estimated share of wrong labels, with its 95 % interval.

    Args:
        rate (`float`):
            ε, in [0, 0.5].
        low, high (`float`):
            Ends of the profile likelihood interval. The interval accounts for the number of pairs, and for how well
            the scorer's own errors can be told from wrong labels; it doesn't account for the randomness of the
            scorer's training.
        slope (`float`):
            b: the log-odds that the scorer is right, per unit of its margin.
        pairs (`int`):
            Number of pairs with a margin.
    """

    rate: float
    low: float
    high: float
    slope: float
    pairs: int

    @property
    def is_reliable(self) -> bool:
        """
        Whether single labels can be judged by it. Scorers that learned nothing are compatible with a rate of ½, and a
        wide interval leaves the rate open.
        """
        return self.high < 0.5 and self.high - self.low <= WIDEST_INTERVAL

    @property
    def label_smoothing(self) -> float:
        """
        The rate as an argument of DPO's configuration: the ε of cDPO (E. Mitchell, "A note on DPO with noisy
        preferences & relationship to IPO", 2023) and of robust DPO, where it has to be below ½. 0, which means no
        smoothing, if the rate is not reliable.
        """
        return min(self.rate, LARGEST_LABEL_SMOOTHING) if self.is_reliable else 0.0

    def dpo_settings(self) -> dict[str, Any]:
        """
        Arguments for [`~trl.DPOConfig`]. TRL 1.16 reads `label_smoothing` under `loss_type="robust"` (and `exo_pair`,
        `aot`); it has no effect under the default `"sigmoid"`. Empty if the rate is not reliable.
        """
        return {"loss_type": ["robust"], "label_smoothing": self.label_smoothing} if self.is_reliable else {}

    def __str__(self) -> str:
        if not self.is_reliable:
            return f"the share of wrong labels is uncertain: between {self.low:.1%} and {self.high:.1%} (95 %)"
        return f"{self.rate:.1%} of the labels are wrong (95 % interval {self.low:.1%} to {self.high:.1%})"


def estimate_noise(margins: Sequence[float]) -> NoiseEstimate:
    """
    Estimates ε and b (see the module's documentation), and the interval of ε.

    Args:
        margins (`Sequence[float]`):
            score(chosen) − score(rejected) of each pair, in any unit, by a scorer that wasn't trained on the pair.
            NaN, for a pair without scores, is left out.

    Returns:
        [`NoiseEstimate`]

    Raises:
        ValueError: with fewer than 50 margins, or if all are zero or one is infinite.
    """
    given = _checked(margins)
    # The median, so that a few huge margins don't decide in which range b is searched
    unit = float(np.median(np.abs(given))) or float(np.abs(given).mean())
    require(
        unit > 0, "All margins are zero: the scorer prefers no completion. Use a different scorer, or train it longer."
    )
    best_slope = _slope_search(given / unit)

    def profile(rate: float) -> float:
        return best_slope(rate)[1]

    rates = np.linspace(0.0, 0.5, 26)
    profiles = [profile(rate) for rate in rates]
    best = int(np.argmin(profiles))
    around = rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)]
    found = optimize.minimize_scalar(profile, bounds=around, method="bounded", options={"xatol": 1e-5})
    # `bounded` never tries the ends of the interval, and 0 is the rate of clean labels
    rate, least = min([(float(found.x), float(found.fun)), (float(rates[best]), profiles[best])], key=lambda x: x[1])
    allowed = least + stats.chi2.ppf(0.95, df=1) / 2

    def end(border: float) -> float:
        if profile(border) <= allowed:
            return border
        return float(optimize.brentq(lambda x: profile(x) - allowed, min(rate, border), max(rate, border), xtol=1e-4))

    return NoiseEstimate(rate, end(0.0), end(0.5), math.exp(best_slope(rate)[0]) / unit, len(given))


def _checked(margins: Sequence[float]) -> Any:
    """The margins that are numbers, as an array."""
    given = np.asarray(margins, dtype=np.float64)
    given = given[~np.isnan(given)]
    require(
        len(given) >= FEWEST_PAIRS,
        f"{len(given)} pairs have a margin, but a noise rate needs at least {FEWEST_PAIRS}. Score more pairs.",
    )
    require(
        not np.isinf(given).any(),
        "A margin is infinite. Let the scorer return finite scores, or NaN where it doesn't apply.",
    )
    return given


def _slope_search(margins: Any) -> Callable[[float], tuple[float, float]]:
    """A function from ε to the ln b that is best for it, and to the negative log-likelihood of both."""
    # As a function of ln b, the loss can have a second minimum, so that a coarse grid is searched first. Its σ(b·m)
    # are the same for every ε.
    grid = np.linspace(-5.0, 6.0, 23)
    coarse = [special.expit(math.exp(x) * margins) for x in grid]

    def best_slope(rate: float) -> tuple[float, float]:
        def loss(right: Any) -> float:
            # With ε = 0 and a margin far on the wrong side the likelihood underflows to 0, which has no logarithm
            return -float(np.log(np.maximum(rate + (1 - 2 * rate) * right, 1e-300)).sum())

        best = int(np.argmin([loss(right) for right in coarse]))
        found = optimize.minimize_scalar(
            lambda x: loss(special.expit(math.exp(x) * margins)),
            bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
            method="bounded",
            options={"xatol": 1e-3},
        )
        return float(found.x), float(found.fun)

    return best_slope


def wrong_label_probabilities(margins: Sequence[float], noise: NoiseEstimate) -> list[float]:
    """
    Probability that each label is wrong, given its margin: ε σ(−bm) / ((1 − ε) σ(bm) + ε σ(−bm)), by Bayes' rule in
    the model of [`estimate_noise`]. For a pair without a margin (NaN) it is ε.
    """
    values = np.nan_to_num(np.asarray(margins, dtype=np.float64), nan=0.0) * noise.slope
    # In log-odds, which don't overflow, and with which ε = 0 gives 0
    found: list[float] = special.expit(special.logit(noise.rate) - values).tolist()
    return found
