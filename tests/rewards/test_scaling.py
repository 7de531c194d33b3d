"""The running scale of rewards, against the standard library on all scores at once."""

import random
import statistics
from dataclasses import asdict

import pytest

from trl_ext.rewards.scaling import RunningScale


def test_by_hand():
    # 1, 3 and then 8: mean 4, squares 9 + 1 + 16 = 26, variance 13
    scale = RunningScale()
    scale.update([1.0, 3.0])
    assert (scale.count, scale.mean, scale.squares) == (2, 2.0, 2.0)
    assert scale.deviation == pytest.approx(2**0.5)
    scale.update([8.0])
    assert (scale.count, scale.mean, scale.squares) == pytest.approx((3, 4.0, 26.0))
    assert scale.deviation == pytest.approx(13**0.5)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_however_scores_are_dealt_to_batches(offset):
    generator, scale, scores = random.Random(0), RunningScale(), []
    for size in (1, 7, 0, 3, 20, 1):
        batch = [offset + generator.gauss(3, 2) for _ in range(size)]
        scale.update(batch)
        scores += batch
    assert scale.count == len(scores)
    assert scale.mean == pytest.approx(statistics.fmean(scores))
    assert scale.deviation == pytest.approx(statistics.stdev(scores), rel=1e-9)


@pytest.mark.parametrize("scores", [[], [5.0], [0.7, 0.7, 0.7]])
def test_scores_without_a_deviation_are_left_as_they_are(scores):
    scale = RunningScale()
    scale.update(scores)
    assert scale.deviation == 1.0


def test_small_scores_have_a_deviation():
    scale = RunningScale()
    scale.update([1e-6, 3e-6])
    assert scale.deviation == pytest.approx(2**0.5 * 1e-6)


def test_it_goes_on_from_its_state():
    one, other = RunningScale(), RunningScale()
    for scale in (one, other):
        scale.update([1.0, 2.0, 4.0])
    other = RunningScale(**asdict(other))
    for scale in (one, other):
        scale.update([-3.0, 0.5])
    assert one == other
