"""Held-out estimates: intervals against values worked out by hand, and measuring that leaves training as it was."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import TrainerControl

from trl_ext import DAPOTrainer
from trl_ext.evaluation.held_out import Estimate, HeldOut, difference, evaluate_policy, read_estimates


NAN = math.nan


def estimate(*rows: list[float]) -> Estimate:
    return Estimate.of(torch.tensor(rows))


@dataclass
class Scripted:
    """A trainer whose completions always get the same rewards, by the row's `reward`; remembers what it was asked."""

    asked: list[tuple[list[int], int, int | None]] = field(default_factory=list)

    def roll_out(self, rows, num_generations, seed=None):
        self.asked.append(([row["id"] for row in rows], num_generations, seed))
        right = torch.tensor([row["reward"] for row in rows]).view(-1, 1, 1).expand(-1, num_generations, 1)
        return SimpleNamespace(
            rewards=torch.cat([right, torch.full_like(right, NAN)], dim=2), reward_func_names=["right", "never"]
        )


def test_the_interval_is_that_of_the_prompts():
    # Prompt means 2, 3, 7: mean 4, variance (4 + 1 + 9) / 2 = 7, standard error sqrt(7 / 3) = 1.527525.
    # t(2 degrees, 97.5 %) = 4.302653, so the interval reaches 6.572411 either way. Not a rate: not cut.
    found = estimate([1, 3], [2, 4], [6, 8])
    assert found.mean == 4
    assert found.low == pytest.approx(4 - 6.572411)
    assert found.high == pytest.approx(4 + 6.572411)
    assert (found.prompts, found.samples) == (3, 6)
    assert found.per_prompt == (2, 3, 7)


def test_more_samples_that_say_the_same_narrow_nothing():
    once = estimate([0], [1], [1], [0], [1])
    copied = estimate(*([value] * 8 for value in (0, 1, 1, 0, 1)))
    assert (copied.low, copied.high) == (once.low, once.high)


def test_intervals_cover_the_truth_about_19_times_in_20():
    # Prompts of very different difficulty, 4 samples each. Counting samples as independent would cover far less often.
    generator = torch.Generator().manual_seed(0)
    covered = naive = 0
    for _ in range(500):
        difficulty = (torch.rand(60, 1, generator=generator) > 0.4).double() * 0.9 + 0.05  # true mean: 0.05 + 0.54
        samples = (torch.rand(60, 4, generator=generator) < difficulty).double()
        found = Estimate.of(samples)
        covered += found.low <= 0.59 <= found.high
        reach = 1.96 * samples.std() / math.sqrt(samples.numel())
        naive += abs(samples.mean() - 0.59) <= reach
    assert 0.92 <= covered / 500 <= 0.98
    assert naive / 500 < 0.85


def test_a_rate_stays_within_0_and_1():
    # Means 1, 1, 0.5: mean 0.8333, error 0.16667, reach 0.717: 0.116 to 1.55 before the cut
    found = estimate([1, 1], [1, 1], [0, 1])
    assert found.low == pytest.approx(5 / 6 - 4.302653 / 6)
    assert found.high == 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_unanimous_samples_are_not_certainty(value):
    # Clopper and Pearson, 10 trials without exception: 1 - 0.025^(1/10) = 0.308497
    found = estimate(*[[value] * 4] * 10)
    assert found.mean == value
    assert abs(found.low - found.high) == pytest.approx(0.308497, abs=1e-6)


def test_what_does_not_apply_is_left_out():
    found = estimate([1, NAN], [NAN, NAN], [0, 1])
    assert found.mean == pytest.approx((1 + 0.5) / 2)
    assert (found.prompts, found.samples) == (2, 3)
    assert math.isnan(found.per_prompt[1])


def test_one_prompt_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 prompts, got 1 of 2"):
        estimate([1, 0], [NAN, NAN])


def test_differences_pair_the_prompts():
    # Means 0, 0.5, 1 become 0.5, 1, 1: changes 0.5, 0.5, 0. Mean 1/3, variance 1/12, error 1/6.
    gain = difference(estimate([0, 0], [0, 1], [1, 1]), estimate([1, 0], [1, 1], [1, 1]))
    assert gain.mean == pytest.approx(1 / 3)
    assert gain.low == pytest.approx(1 / 3 - 4.302653 / 6)
    assert gain.high == pytest.approx(1 / 3 + 4.302653 / 6)


def test_differences_without_the_prompts_add_in_quadrature():
    # From 0.4 (0.3 to 0.6) to 0.7 (0.65 to 0.8): down by hypot(0.05, 0.2), up by hypot(0.1, 0.1)
    gain = difference(Estimate(0.4, 0.3, 0.6, 10, 40), Estimate(0.7, 0.65, 0.8, 10, 40))
    assert gain.mean == pytest.approx(0.3)
    assert gain.low == pytest.approx(0.3 - math.sqrt(0.0425))
    assert gain.high == pytest.approx(0.3 + math.sqrt(0.02))


def test_every_prompt_is_asked_once_with_its_own_seed():
    trainer = Scripted()
    rows = [{"id": i, "reward": float(i < 2)} for i in range(5)]
    found = evaluate_policy(trainer, rows, num_samples=3, batch_size=2, seed=7)
    assert trainer.asked == [([0, 1], 3, 7), ([2, 3], 3, 1007), ([4], 3, 2007)]
    assert list(found) == ["right"]  # the other function never applied
    assert found["right"].mean == pytest.approx(2 / 5)
    assert (found["right"].prompts, found["right"].samples) == (5, 15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
        ({"dataset": [{"id": 0, "reward": 1.0}]}, "dataset has 1 rows"),
    ],
)
def test_bad_input_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_policy(Scripted(), **{"dataset": [], **settings})


def trained(tmp_path, held_out: dict | None, resume=None, **settings):
    trainer = tiny.trainer(DAPOTrainer, tmp_path, max_steps=4, **settings)
    callback = None
    if held_out is not None:
        callback = HeldOut(trainer, list(tiny.prompts(10)), num_samples=4, batch_size=4, **held_out)
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.mark.train
def test_measuring_changes_nothing_about_training(tmp_path):
    plain, _ = trained(tmp_path / "plain", None)
    watched, callback = trained(tmp_path / "watched", {"every": 2})
    for name, weight in tiny.weights(plain.model).items():
        assert torch.equal(weight, watched.model.state_dict()[name]), name
    assert tiny.history(plain) == tiny.history(watched)  # each step is logged, with the same numbers
    assert list(callback.measured) == [0, 2, 4]
    assert watched.counters == plain.counters


@pytest.mark.train
def test_the_policy_is_measured_where_it_stands(tmp_path):
    trainer, callback = trained(tmp_path, {})
    again = evaluate_policy(trainer, list(tiny.prompts(10)), num_samples=4, batch_size=4)
    assert callback.measured[4] == again
    untrained = tiny.trainer(DAPOTrainer, tmp_path)
    assert callback.measured[0] == evaluate_policy(untrained, list(tiny.prompts(10)), num_samples=4, batch_size=4)
    assert callback.before == callback.measured[0] != callback.after == again


@pytest.mark.train
def test_the_log_holds_what_was_measured(tmp_path):
    trainer, callback = trained(tmp_path, {"every": 3})
    read = read_estimates(trainer.state.log_history)
    assert list(read) == [0, 3, 4]
    for step, estimates in callback.measured.items():
        expected, found = estimates["first_token_even"], read[step]["first_token_even"]
        assert (found.mean, found.low, found.high) == (expected.mean, expected.low, expected.high)
        assert (found.prompts, found.samples, found.per_prompt) == (10, 40, ())


@pytest.mark.train
def test_a_resumed_run_remembers_the_start(tmp_path):
    whole, before = trained(tmp_path, {}, save_strategy="steps", save_steps=2)
    resumed, after = trained(tmp_path, {}, resume=str(tmp_path / "checkpoint-2"), save_strategy="no")
    assert list(after.measured) == [0, 4]
    assert after.measured[4] == before.measured[4]
    assert after.before["first_token_even"].mean == before.before["first_token_even"].mean
    assert after.before["first_token_even"].per_prompt == ()  # read, not measured again
    assert len(read_estimates(resumed.state.log_history)) == len(read_estimates(whole.state.log_history))


def test_the_best_model_is_measured_again_when_it_replaces_the_last(tmp_path):
    trainer = tiny.trainer(DAPOTrainer, tmp_path)
    callback = HeldOut(trainer, list(tiny.prompts(4)), num_samples=4)
    trainer.state.global_step = 4
    callback.measured = {0: {}, 4: {}}
    trainer.args.load_best_model_at_end = True
    callback.on_train_end(trainer.args, trainer.state, TrainerControl())
    assert callback.measured[4]["first_token_even"].prompts == 4
