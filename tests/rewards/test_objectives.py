"""Weights that follow a schedule or a constraint: by hand, and what real runs trained with against their logs."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from processes import run

from trl_ext import DAPOTrainer, DUPOTrainer, GRPOTrainer, GSPOTrainer, PPOTrainer, verify
from trl_ext.rewards.objectives import ObjectiveSchedule, RewardConstraint, RewardObjectives


def shorter(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [1 - len(ids) / 6 for ids in completion_ids]


def odd_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [1 - even for even in tiny.low_ids(completion_ids)]


# Schedules


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # From 1 at a fifth of the run to 3 at three fifths; a quarter of the way is (1 − cos 45°) / 2 for a cosine
        ("linear", [1, 1, 1.5, 2, 3, 3]),
        ("cosine", [1, 1, 1 + (1 - math.sqrt(0.5)), 2, 3, 3]),
        ("steps", [1, 1, 1, 1, 3, 3]),
    ],
)
def test_schedules_by_hand(shape, expected):
    schedule = ObjectiveSchedule([(0.2, 1.0), (0.6, 3.0)], shape)
    assert [schedule(share) for share in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)] == pytest.approx(expected)


def test_a_constant_and_many_points():
    assert [ObjectiveSchedule([(0.0, 0.7)])(share) for share in (0, 0.5, 1)] == [0.7] * 3
    stairs = ObjectiveSchedule([(0, 1), (0.25, 2), (0.5, 4), (1, 0)])
    assert [stairs(share) for share in (0.125, 0.25, 0.375, 0.75)] == [1.5, 2, 3, 2]


# Constraints


def test_lambda_by_hand():
    constraint = RewardConstraint("b", floor=0.5, learning_rate=2.0, maximum=1.5)
    assert constraint.updated(0.25, 0.375) == 0.5  # + 2 × 0.125
    assert constraint.updated(0.25, 0.75) == 0.0  # 0.25 − 0.5, not below 0
    assert constraint.updated(0.25, 0.5) == 0.25
    assert constraint.updated(1.25, 0.0) == 1.5  # at most
    assert constraint.updated(0.25, math.nan) == 0.25


def test_dual_descent_finds_the_constrained_optimum():
    # A number x in [0, 1], A = x, B = 1 − x² ≥ 0.75. Optimum: x = 0.5, where dA/dx + λ·dB/dx = 1 − 2λx = 0, so λ = 1
    constraint, x, multiplier = RewardConstraint("b", floor=0.75, learning_rate=0.05), 0.9, 0.0
    for _ in range(3000):
        multiplier = constraint.updated(multiplier, 1 - x**2)
        x = min(max(x + 0.02 * (1 - multiplier * 2 * x), 0.0), 1.0)
    assert x == pytest.approx(0.5, abs=1e-3)
    assert multiplier == pytest.approx(1.0, abs=1e-3)


# Settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ObjectiveSchedule([]), "there must be at least one"),
        (lambda: ObjectiveSchedule([(0.5, 1.0), (0.2, 0.0)]), "must ascend"),
        (lambda: ObjectiveSchedule([(0.5, 1.0), (0.5, 0.0)]), "must ascend"),
        (lambda: ObjectiveSchedule([(0.0, 1.0), (50, 0.0)]), r"within \[0, 1\]"),
        (lambda: ObjectiveSchedule([(0.0, math.nan)]), "weights must be finite"),
        (
            lambda: ObjectiveSchedule([(0.0, 1.0)], "lines"),
            "shape='lines' is unknown. Choose one of 'linear', 'cosine'",
        ),
        (lambda: RewardConstraint("b", math.inf, 0.1), "RewardConstraint of 'b': floor=inf must be finite"),
        (lambda: RewardConstraint("b", 0.5, 0.0), "learning_rate=0.0 must be positive"),
        (lambda: RewardConstraint("b", 0.5, 0.1, initial=-1.0), "initial=-1.0 must not be negative"),
        (lambda: RewardConstraint("b", 0.5, 0.1, initial=2.0, maximum=1.0), "nor above maximum=1.0"),
        (lambda: RewardObjectives(), "without schedules and constraints does nothing"),
        (
            lambda: RewardObjectives(constraints=[RewardConstraint("b", 0.5, 0.1), RewardConstraint("b", 0.6, 0.1)]),
            "The constraints are for b, b: a reward can have only one floor",
        ),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_it_cannot_be_attached_to(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path, [tiny.low_ids, shorter])
    with pytest.raises(
        ValueError, match="'longer' must be the name of one reward function, but they are low_ids, shorter"
    ):
        RewardObjectives({"longer": 1.0}).attach(trainer)
    RewardObjectives({"shorter": 1.0}).attach(trainer)
    with pytest.raises(ValueError, match="has objectives already"):
        RewardObjectives({"low_ids": 1.0}).attach(trainer)
    theirs = trl.GRPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.low_ids,
        args=trl.GRPOConfig(**tiny.cpu_settings(tmp_path)),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    with pytest.raises(TypeError, match=r"needs a trainer of trl_ext, not GRPOTrainer\. Change the import"):
        RewardObjectives({"low_ids": 1.0}).attach(theirs)


def test_weights_are_schedules_and_reward_weights_plus_lambda():
    objectives = RewardObjectives(
        {"a": ObjectiveSchedule([(0, 1.0), (1, 2.0)])},
        [RewardConstraint("b", 0.5, 1.0, initial=0.75)],
        normalize=False,
    )
    objectives._base = {"a": 9.0, "b": 0.25, "c": 3.0}
    assert objectives.weights(["a", "b", "c"], 0.5) == [1.5, 1.0, 3.0]
    objectives.normalize = True
    assert objectives.weights(["a", "b", "c"], 0.5) == pytest.approx([1.5 / 1.75, 1.0 / 1.75, 3.0 / 1.75])


# Real runs


def build(trainer_class: Any, directory: Path, recorded: bool = True, **settings: Any) -> tuple[Any, RewardObjectives]:
    if recorded:
        trainer_class = tiny.recorded(trainer_class)
    settings = {
        "max_steps": 6,
        "reward_weights": [1.0, 0.0, 0.5],
        "save_strategy": "steps",
        "save_steps": 1,
        **settings,
    }
    rewards = [tiny.low_ids, odd_ids, shorter]
    trainer = tiny.trainer(trainer_class, directory, rewards, **settings)
    objectives = RewardObjectives(
        {"low_ids": ObjectiveSchedule([(0.0, 2.0), (1.0, 0.5)])},
        [RewardConstraint("odd_ids", floor=0.7, learning_rate=0.5)],
    ).attach(trainer)
    return trainer, objectives


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in tiny.history(trainer) if key in entry]


@pytest.mark.train
@pytest.mark.parametrize(
    "trainer_class", [GRPOTrainer, DAPOTrainer, DUPOTrainer, GSPOTrainer, PPOTrainer], ids=lambda c: c.__name__
)
def test_the_weights_of_a_batch_are_those_logged_for_it(tmp_path, trainer_class):
    settings = {"kl_coef": 0.0, "whiten_advantages": False, "lam": 1.0} if trainer_class is PPOTrainer else {}
    trainer, objectives = build(trainer_class, tmp_path, num_iterations=1, scale_rewards="none", **settings)
    trainer.train()
    means, multipliers = logged(trainer, "rewards/odd_ids/mean"), logged(trainer, "rewards/odd_ids/multiplier")
    assert len(trainer.batches) == len(means) == 6  # one generation batch a step
    assert logged(trainer, "rewards/odd_ids/shortfall") == [0.7 - mean for mean in means]
    # λ by hand, from what was logged
    expected = [0.0]
    for mean in means:
        expected.append(max(0.0, expected[-1] + 0.5 * (0.7 - mean)))
    assert multipliers == pytest.approx(expected[:-1])
    assert objectives.multipliers["odd_ids"] == pytest.approx(expected[-1])
    assert max(multipliers) > 0
    scheduled = [2.0 - 1.5 * step / 6 for step in range(6)]
    assert logged(trainer, "rewards/low_ids/weight") == pytest.approx(scheduled)
    assert logged(trainer, "rewards/odd_ids/weight") == pytest.approx(expected[:-1])
    assert logged(trainer, "rewards/shorter/weight") == [0.5] * 6
    # What was trained on
    for batch, own, floor in zip(trainer.batches, scheduled, multipliers, strict=True):
        ids = batch.completions
        score = torch.tensor([tiny.low_ids(ids), odd_ids(ids), shorter(ids)]).T @ torch.tensor([own, floor, 0.5])
        if trainer_class is PPOTrainer:  # returns at λ = γ = 1: the score, at every token
            found = torch.stack([returns[0] for returns in batch.output["returns"]])
        else:
            score = (score.view(-1, 4) - score.view(-1, 4).mean(dim=1, keepdim=True)).flatten()
            found = batch.output["advantages"]
        torch.testing.assert_close(found, score)


@pytest.mark.train
@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"steps_per_generation": 4}], ids=str)
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, PPOTrainer], ids=lambda c: c.__name__)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, trainer_class, settings):
    settings = {"num_iterations": 1, **settings}
    if trainer_class is PPOTrainer:
        settings["kl_coef"] = 0.0
    whole, objectives = build(trainer_class, tmp_path / "whole", recorded=False, **settings)
    whole.train()
    assert objectives.multipliers["odd_ids"] > 0
    for step in (1, 4):
        resumed, again = build(trainer_class, tmp_path / f"from-{step}", recorded=False, save_steps=9, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.multipliers == objectives.multipliers
        assert torch.equal(resumed.reward_weights, whole.reward_weights)
        assert tiny.history(resumed) == tiny.history(whole)
        for name, weight in tiny.weights(whole.model).items():
            assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.train
def test_weights_are_restored_with_the_batch_that_is_in_use(tmp_path):
    trainer, _ = build(GRPOTrainer, tmp_path)
    trainer.train()
    again, objectives = build(GRPOTrainer, tmp_path)
    again.load_run_state(trainer.run_state())
    assert again.reward_weights.tolist() == trainer.reward_weights.tolist() != [1.0, 0.0, 0.5]
    assert objectives.multipliers["odd_ids"] > 0


@pytest.mark.train
def test_a_batch_whose_generation_fails_moves_nothing(tmp_path):
    trainer, objectives = build(GRPOTrainer, tmp_path, save_strategy="no")
    moved: list[float] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            moved.append(objectives.multipliers["odd_ids"])
            raise RuntimeError("no more")
        return inner(*args, **kwargs)

    inner, trainer._generate = trainer._generate, failing
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    state = torch.load(tmp_path / "checkpoint-3" / "trl_ext_state.pt", weights_only=False)
    assert state["run"]["reward_objectives"]["multipliers"]["odd_ids"] == moved[0] > 0


def test_looking_moves_nothing(tmp_path):
    trainer, objectives = build(GRPOTrainer, tmp_path)
    before = trainer.reward_weights.clone()
    verify(trainer, repetitions=1, quiet=True)
    trainer.roll_out([trainer.train_dataset[0]], 4, seed=1)
    assert objectives.multipliers == {"odd_ids": 0.0}
    assert torch.equal(trainer.reward_weights, before)


def test_each_trainer_starts_anew(tmp_path):
    """As it would in a process of its own."""
    _, objectives = build(GRPOTrainer, tmp_path)
    objectives.multipliers["odd_ids"] = 3.0
    objectives.attach(tiny.trainer(GRPOTrainer, tmp_path, [tiny.low_ids, odd_ids]))
    assert objectives.multipliers == {"odd_ids": 0.0}


@pytest.mark.train
def test_a_floor_is_kept(tmp_path):
    """A = share of even ids, B = share of odd ids = 1 − A. Without the floor B goes to 0."""

    def last(constraints: list[RewardConstraint]) -> float:
        settings = {"max_steps": 40, "reward_weights": [1.0, 0.0], "scale_rewards": "none", "learning_rate": 3e-3}
        trainer = tiny.trainer(GRPOTrainer, tmp_path, [tiny.low_ids, odd_ids], **settings)
        RewardObjectives({"low_ids": 1.0}, constraints).attach(trainer)
        trainer.train()
        found = logged(trainer, "rewards/odd_ids/mean")[-10:]
        return sum(found) / len(found)

    assert last([]) < 0.15
    assert last([RewardConstraint("odd_ids", floor=0.4, learning_rate=2.0)]) > 0.3


@pytest.mark.distributed
def test_two_processes_share_one_lambda(tmp_path):
    worker = Path(__file__).with_name("objectives_worker.py")
    run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, tmp_path])
    # The reward is the rank: 0.5 on the mean of both. λ after two batches: 2 × 0.25 × (1 − 0.5)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [{"rank": 0.25}] * 2
