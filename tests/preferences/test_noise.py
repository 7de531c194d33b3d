"""The noise rate on margins whose noise is known, and what it makes of single labels."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from trl_ext.preferences.noise import estimate_noise, wrong_label_probabilities


def margins(noise: float, slope: float, spread: float, count: int = 4000, seed: int = 0) -> np.ndarray:
    """Margins of a scorer that is right with log-odds slope·|m|, under labels turned around with probability noise."""
    draw = np.random.default_rng(seed)
    size = np.abs(draw.normal(0, spread, count))
    right = draw.random(count) < 1 / (1 + np.exp(-slope * size))
    turned = draw.random(count) < noise
    return np.where(right ^ turned, size, -size)


def test_the_rate_is_found_in_its_interval(subtests):
    for noise, slope in product([0.0, 0.1, 0.2, 0.35], [2.0, 5.0]):
        with subtests.test(noise=noise, slope=slope):
            estimate = estimate_noise(margins(noise, slope, spread=1.0))
            assert estimate.low <= noise <= estimate.high
            assert estimate.high - estimate.low < 0.1
            assert abs(estimate.rate - noise) < 0.04
            assert estimate.pairs == 4000


def test_the_scorers_own_errors_are_not_counted():
    """This scorer contradicts 30 % of labels of which 10 % are wrong."""
    given = margins(0.1, slope=2.0, spread=1.0)
    assert (given < 0).mean() > 0.28
    assert abs(estimate_noise(given).rate - 0.1) < 0.03


def test_the_unit_of_the_scorer_does_not_matter():
    given = margins(0.2, 3.0, 1.0)
    one, other = estimate_noise(given), estimate_noise(given * 1000)
    assert one.rate == pytest.approx(other.rate, abs=1e-3)
    assert one.slope == pytest.approx(other.slope * 1000, rel=1e-2)
    assert one.low < one.rate < one.high


def test_fewer_pairs_are_less_certain_and_intervals_cover():
    few, many = (estimate_noise(margins(0.2, 3.0, 1.0, count)) for count in (300, 6000))
    assert few.high - few.low > 2 * (many.high - many.low)
    estimates = [estimate_noise(margins(0.2, 3.0, 1.0, 1000, seed)) for seed in range(20)]
    assert sum(estimate.low <= 0.2 <= estimate.high for estimate in estimates) >= 17  # P(fewer | 95 %) = 0.3 %


def test_a_scorer_that_knows_nothing_says_so():
    draw = np.random.default_rng(0)
    estimate = estimate_noise(draw.normal(size=500))
    assert estimate.high == 0.5
    assert estimate.high - estimate.low > 0.1  # half wrong, or a scorer that can't tell: it doesn't know which


def test_bayes_rule_by_hand():
    # ε = 0.2, b = 1: at m = −ln 9, σ(bm) = 0.1, so that 0.2·0.9 / (0.8·0.1 + 0.2·0.9) = 0.18/0.26
    estimate = estimate_noise(margins(0.2, 3.0, 1.0))
    known = type(estimate)(0.2, 0.1, 0.3, 1.0, 100)
    found = wrong_label_probabilities([-math.log(9), 0.0, math.log(9), math.nan, -1e6, 1e6], known)
    assert found == pytest.approx([0.18 / 0.26, 0.2, 0.02 / 0.74, 0.2, 1.0, 0.0])


def test_the_probabilities_are_calibrated():
    draw, given = np.random.default_rng(3), margins(0.0, 3.0, 1.0, 20_000)
    turned = draw.random(len(given)) < 0.2
    given = np.where(turned, -given, given)
    wrong = np.array(wrong_label_probabilities(given, estimate_noise(given)))
    assert wrong.mean() == pytest.approx(0.2, abs=0.02)
    for low, high in ((0.0, 0.1), (0.3, 0.6), (0.8, 1.0)):
        among = (wrong >= low) & (wrong < high)
        assert turned[among].mean() == pytest.approx(wrong[among].mean(), abs=0.04)


def test_what_dpo_gets():
    estimate = estimate_noise(margins(0.2, 5.0, 1.0))
    assert estimate.dpo_settings() == {"loss_type": ["robust"], "label_smoothing": estimate.rate}
    coin = type(estimate)(0.5, 0.4, 0.5, 1.0, 100)
    assert not coin.is_reliable
    assert (coin.label_smoothing, coin.dpo_settings()) == (0.0, {})
    high = type(estimate)(0.4999, 0.4998, 0.49999, 1.0, 100)
    assert high.is_reliable and high.label_smoothing == 0.49  # robust DPO divides by 1 − 2ε
    assert str(type(estimate)(0.21, 0.18, 0.25, 1.0, 100)) == (
        "21.0% of the labels are wrong (95 % interval 18.0% to 25.0%)"
    )


def test_bad_margins_are_named():
    with pytest.raises(ValueError, match="49 pairs have a margin, but a noise rate needs at least 50"):
        estimate_noise([*[1.0] * 49, math.nan])
    with pytest.raises(ValueError, match="A margin is infinite"):
        estimate_noise([1.0] * 60 + [math.inf])
    with pytest.raises(ValueError, match="All margins are zero"):
        estimate_noise([0.0] * 60)


def test_what_can_be_told():
    def told(low: float, high: float) -> bool:
        return replace(estimate_noise(margins(0.2, 5.0, 1.0)), low=low, high=high).is_reliable

    assert told(0.18, 0.22) and told(0.0, 0.25)
    assert not told(0.3, 0.5)  # no worse than a coin
    assert not told(0.0, 0.47)  # next to nothing is known
