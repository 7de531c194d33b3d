"""Probabilities that are made to mean what they say, and how far off they are: by hand and simulated."""

import random

import pytest

from trl_ext.rollouts.calibration import BINS, Calibration, read_curve


def simulated(true_rate, batches: int, seed: int = 0) -> Calibration:
    """32 predictions a batch, of which each comes true with the probability that `true_rate` makes of it."""
    generator, calibration = random.Random(seed), Calibration()
    for _ in range(batches):
        predicted = [generator.uniform(0.05, 0.95) for _ in range(32)]
        calibration.tick()
        calibration.observe(predicted, [generator.random() < true_rate(p) for p in predicted])
    return calibration


def test_nothing_is_changed_before_anything_is_known():
    assert Calibration().error == 0.0
    assert Calibration()(0.3) == pytest.approx(0.3, abs=0.02)
    assert Calibration()(0.0) < 0.02 and Calibration()(1.0) > 0.98


def test_error_by_hand():
    calibration = Calibration()
    calibration.curve = [(0.0, 0.0, 0.0)] * BINS
    calibration.curve[2] = (3.0, 0.75, 0.0)  # 0.25 was predicted, and never came true
    calibration.curve[9] = (1.0, 0.95, 1.0)
    assert calibration.error == pytest.approx((3 * 0.25 + 1 * 0.05) / 4)


def test_hopeful_predictions_are_corrected():
    corrected = simulated(lambda p: p / 2, batches=60)
    assert corrected(0.8) == pytest.approx(0.4, abs=0.08)
    assert corrected.error < 0.06
    assert simulated(lambda p: p, batches=60)(0.8) == pytest.approx(0.8, abs=0.06)


def test_the_curve_shows_what_was_predicted_and_what_came_true():
    curve = simulated(lambda p: p, batches=60).curve
    assert sum(count for count, _, _ in curve) == pytest.approx(500, rel=0.05)
    for place, (count, predicted, true) in enumerate(curve):
        assert place / BINS <= predicted / count <= (place + 1) / BINS
        assert true / count == pytest.approx(predicted / count, abs=0.2)


def test_the_curve_is_read_from_a_log():
    calibration = Calibration()
    assert calibration.metrics() == {"selection/calibration_error": 0.0}
    assert read_curve([]) == read_curve([calibration.metrics()]) == []
    calibration.curve[2] = (3.0, 0.75, 0.0)
    calibration.curve[9] = (1.0, 0.95, 1.0)
    later = {"train_runtime": 1.0, **calibration.metrics()}
    assert later["selection/calibration_error"] == pytest.approx(0.2)
    assert read_curve([{"reliability/0/groups": 9.0}, {"reward": 1.0}, later, {"eval_reward": 1.0}]) == [
        (3.0, 0.25, 0.0),
        (1.0, 0.95, 1.0),
    ]


def test_goes_on_where_it_was():
    whole, copied = simulated(lambda p: p**2, batches=5), Calibration()
    copied.load_state_dict(whole.state_dict())
    for calibration in (whole, copied):
        calibration.observe([0.1, 0.6], [True, False])
    assert whole.state_dict()["curve"] == copied.state_dict()["curve"]
    assert whole(0.37) == copied(0.37)
