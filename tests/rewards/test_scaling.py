"""The running scale of rewards, against the standard library on all scores at once."""

import random
import statistics
from dataclasses import asdict

import pytest
import tiny

from trl_ext.rewards import scaling
from trl_ext.rewards.scaling import REWARD_SCALINGS, RunningScale
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer


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


# What scores are divided by


def never() -> list[float]:
    raise AssertionError("the scores were gathered")


def test_without_scaling_no_score_is_gathered():
    running = RunningScale()
    assert REWARD_SCALINGS["none"](never, running, True) == 1.0
    assert running == RunningScale()


def test_the_scale_of_a_batch_is_its_own():
    running = RunningScale()
    running.update([0.0, 100.0])
    before = asdict(running)
    assert REWARD_SCALINGS["batch"](lambda: [1.0, 3.0], running, True) == pytest.approx(2**0.5)
    assert asdict(running) == before


def test_the_running_scale_is_of_all_scores_of_training():
    running = RunningScale()
    assert REWARD_SCALINGS["running"](lambda: [1.0, 3.0], running, True) == pytest.approx(2**0.5)
    assert REWARD_SCALINGS["running"](lambda: [50.0, 90.0], running, False) == pytest.approx(2**0.5)
    assert REWARD_SCALINGS["running"](lambda: [8.0], running, True) == pytest.approx(13**0.5)
    assert running.count == 3


def by_their_largest(scores, running, training):
    return max(map(abs, scores()))


@pytest.mark.train
def test_a_new_scaling_is_one_function_and_one_entry(tmp_path, monkeypatch):
    settings = {**tiny.cpu_settings(tmp_path), "reward_scaling": "largest"}
    with pytest.raises(ValueError, match=r"reward_scaling='largest' is unknown\. Choose one of 'none', 'batch', 'run"):
        PPOConfig(**settings)
    monkeypatch.setitem(scaling.REWARD_SCALINGS, "largest", by_their_largest)
    losses = {}
    for name in ("none", "largest"):
        reward = tiny.Remembering(lambda completion_ids, **_: [5.0 * r for r in tiny.hashed(completion_ids)])
        settings = {"reward_scaling": name, "kl_coef": 0.0, "whiten_advantages": False, "max_steps": 1}
        trainer = tiny.trainer(PPOTrainer, tmp_path / name, reward, **settings)
        trainer.train()
        largest = max(abs(r) for call in reward.at_step(0) for r in call.rewards)
        losses[name] = tiny.history(trainer)[0]["val/return"]
    # The values start at 0, so that without a penalty all returns are proportional to the scores
    assert losses["largest"] == pytest.approx(losses["none"] / largest)
