"""
How many labels of a set of preference pairs are wrong, from what a scorer that didn't train on them thinks of each.

A scorer gives each pair a margin m = score(chosen) − score(rejected). Two things make it contradict a label: the label
is wrong, or the scorer is. With a share ε of the labels turned around, whatever the pair, and a scorer whose log-odds
of being right grow with its margin,

    P(margin of sign + | |m|) = (1 − ε) σ(b|m|) + ε σ(−b|m|) = ε + (1 − 2ε) σ(b|m|).

The first equation is a Bradley–Terry model in a noisy channel, as of robust DPO (https://huggingface.co/papers/2403.00409,
section 3); b calibrates a scorer that is too sure, or not sure enough. Both are fitted by maximum likelihood: ε is the
rate at which the scorer contradicts labels where it is sure, and b what it gets wrong elsewhere. Confident learning
(https://huggingface.co/papers/1911.00068) counts contradictions among confident cases, too, but has to draw a line for
what is confident, and takes what the scorer gets wrong beyond it for wrong labels.

What it assumes: margins from a scorer that didn't see the pair's label; labels turned around independently of how hard
a pair is. Pairs between which even the true preference is undecided are not counted as noise. Where a scorer is
confidently wrong (on a kind of pair that it can't judge), those pairs are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special, stats


# Below this many pairs the interval, which comes from a large-sample rule, says little
FEWEST_PAIRS = 50
WIDEST_INTERVAL = 0.25  # of a rate from which single labels are judged
# Robust DPO divides by 1 − 2ε
LARGEST_LABEL_SMOOTHING = 0.49


@dataclass(frozen=True)
class NoiseEstimate:
    """
    Share of the labels that are wrong, with its 95 % interval.

    Args:
        rate (`float`):
            ε, in [0, 0.5].
        low, high (`float`):
            Ends of the profile likelihood interval. It knows how few the pairs are, and how far the scorer's own
            errors can be told from wrong labels; not that the scorer came out of one training among many.
        slope (`float`):
            b: log-odds that the scorer is right, per unit of its margin.
        pairs (`int`):
            Pairs that had a margin.
    """

    rate: float
    low: float
    high: float
    slope: float
    pairs: int

    @property
    def is_told(self) -> bool:
        """
        Whether the margins say something of single labels: scorers that learned nothing fit a rate of ½, and so does
        any other within a wide interval.
        """
        return self.high < 0.5 and self.high - self.low <= WIDEST_INTERVAL

    @property
    def label_smoothing(self) -> float:
        """
        The rate as an argument of DPO's configuration: the ε of cDPO (E. Mitchell, "A note on DPO with noisy
        preferences & relationship to IPO", 2023) and of robust DPO, which has to stay below ½. 0, for none, where the
        rate can't be told.
        """
        return min(self.rate, LARGEST_LABEL_SMOOTHING) if self.is_told else 0.0

    def dpo_settings(self) -> dict[str, Any]:
        """
        Arguments for [`~trl.DPOConfig`]. TRL 1.16 reads `label_smoothing` under `loss_type="robust"` (and `exo_pair`,
        `aot`); under the default `"sigmoid"` it would do nothing. Empty where the rate can't be told.
        """
        return {"loss_type": ["robust"], "label_smoothing": self.label_smoothing} if self.is_told else {}

    def __str__(self) -> str:
        if not self.is_told:
            return f"the share of wrong labels can't be told: between {self.low:.1%} and {self.high:.1%} (95 %)"
        return f"{self.rate:.1%} of the labels are wrong (95 % interval {self.low:.1%} to {self.high:.1%})"


def estimate_noise(margins: Sequence[float]) -> NoiseEstimate:
    """
    Fits ε and b (see the module) and the interval of ε.

    Args:
        margins (`Sequence[float]`):
            score(chosen) − score(rejected) of each pair, in any unit, by a scorer that didn't train on the pair. NaN:
            not scored, left out.

    Raises:
        `ValueError`: with fewer than 50 margins, or if all are zero or some infinite.
    """
    given = np.asarray(margins, dtype=np.float64)
    given = given[~np.isnan(given)]
    if len(given) < FEWEST_PAIRS:
        raise ValueError(
            f"{len(given)} pairs have a margin, but a noise rate needs at least {FEWEST_PAIRS}. Score more pairs."
        )
    if np.isinf(given).any():
        raise ValueError("A margin is infinite. Let the scorer give finite scores, or NaN where it doesn't apply.")
    # The median, because a few huge margins must not decide where b is searched
    unit = float(np.median(np.abs(given))) or float(np.abs(given).mean())
    if unit == 0:
        raise ValueError("All margins are zero: the scorer tells no pair apart. Use another, or train it longer.")
    scaled = given / unit

    # A function of ln b with, rarely, a second minimum: a coarse look first, whose σ serve every ε
    grid = np.linspace(-5.0, 6.0, 23)
    coarse = [special.expit(math.exp(x) * scaled) for x in grid]

    def fitted(rate: float) -> tuple[float, float]:
        """The best ln b for this ε, and minus its log-likelihood."""

        def loss(right: Any) -> float:
            # ε = 0 and a margin far on the wrong side: a likelihood of zero, whose logarithm must stay a number
            return -float(np.log(np.maximum(rate + (1 - 2 * rate) * right, 1e-300)).sum())

        best = int(np.argmin([loss(right) for right in coarse]))
        found = optimize.minimize_scalar(
            lambda x: loss(special.expit(math.exp(x) * scaled)),
            bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
            method="bounded",
            options={"xatol": 1e-3},
        )
        return float(found.x), float(found.fun)

    def profile(rate: float) -> float:
        return fitted(rate)[1]

    rates = np.linspace(0.0, 0.5, 26)
    profiles = [profile(rate) for rate in rates]
    best = int(np.argmin(profiles))
    around = rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)]
    found = optimize.minimize_scalar(profile, bounds=around, method="bounded", options={"xatol": 1e-5})
    # `bounded` never tries the ends, and 0 is the rate of clean labels
    rate, least = min([(float(found.x), float(found.fun)), (float(rates[best]), profiles[best])], key=lambda x: x[1])
    allowed = least + stats.chi2.ppf(0.95, df=1) / 2

    def end(border: float) -> float:
        if profile(border) <= allowed:
            return border
        return float(optimize.brentq(lambda x: profile(x) - allowed, min(rate, border), max(rate, border), xtol=1e-4))

    return NoiseEstimate(rate, end(0.0), end(0.5), math.exp(fitted(rate)[0]) / unit, len(given))


def wrong_label_probabilities(margins: Sequence[float], noise: NoiseEstimate) -> list[float]:
    """
    Probability that each label is wrong, given its margin: ε σ(−bm) / ((1 − ε) σ(bm) + ε σ(−bm)), Bayes' rule in the
    model of [`estimate_noise`]. For a pair without a margin (NaN) it is ε.
    """
    values = np.nan_to_num(np.asarray(margins, dtype=np.float64), nan=0.0) * noise.slope
    # As log-odds, which don't overflow, and where ε = 0 stays 0
    found: list[float] = special.expit(special.logit(noise.rate) - values).tolist()
    return found
