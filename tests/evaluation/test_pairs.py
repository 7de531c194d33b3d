"""Pair accuracy: TRL's number, with an interval."""

import math

import pytest
from scipy import stats

from trl_ext.evaluation.held_out import LOG_PREFIX, difference
from trl_ext.evaluation.pairs import PAIR_ACCURACY, read_pair_accuracy


def test_it_is_trls_number_with_an_interval():
    log = [{"step": 0, "eval_accuracy": 0.5}, {"step": 5, "accuracy": 0.9}, {"step": 9, "eval_accuracy": 0.75}]
    measured = read_pair_accuracy(log, pairs=100)
    assert list(measured) == [0, 9]
    estimate = measured[9][PAIR_ACCURACY]
    assert (estimate.mean, estimate.prompts, estimate.samples) == (0.75, 100, 100)
    # 75 ones and 25 zeros: variance 0.75 · 0.25 · 100/99
    reach = stats.t.ppf(0.975, 99) * (0.75 * 0.25 / 99) ** 0.5
    assert (estimate.low, estimate.high) == pytest.approx((0.75 - reach, 0.75 + reach))


def test_all_right_is_not_certainty():
    estimate = read_pair_accuracy([{"step": 1, "eval_accuracy": 1.0}], pairs=20)[1][PAIR_ACCURACY]
    assert estimate.mean == estimate.high == 1 and estimate.low < 0.9


def test_a_gain_does_not_pretend_to_know_which_pairs_changed():
    log = [{"step": 0, "eval_accuracy": 0.5}, {"step": 9, "eval_accuracy": 0.75}]
    before, after = (metrics[PAIR_ACCURACY] for metrics in read_pair_accuracy(log, pairs=100).values())
    gain = difference(before, after)
    assert gain.mean == 0.25
    reach = math.hypot(before.high - before.mean, after.mean - after.low)  # as of two independent samples
    assert gain.low == pytest.approx(0.25 - reach)


def test_what_was_not_evaluated_is_not_there():
    assert read_pair_accuracy([{"step": 1, "loss": 0.5, f"{LOG_PREFIX}r": 1.0}], pairs=20) == {}
