"""
Rewards by step, from the reward function to the token.

A fresh head says 0 everywhere, and one that hardly learns goes on to: with λ = 0 and no KL, the return of a token is
its own reward.
"""

import asyncio
import math
import re
from typing import Any

import pytest
import tiny
import torch
from comparing import Gradients

from trl_ext import GRPOTrainer, PPOTrainer, RewardFunctionError
from trl_ext.rewards.steps import StepRewards


OWN = {
    "kl_coef": 0.0,
    "lam": 0.0,
    "num_iterations": 1,
    "whiten_advantages": False,
    "critic_learning_rate": 1e-9,
    "max_steps": 3,
}


def build(trainer_class: Any, tmp_path: Any, reward: Any, **settings: Any) -> Any:
    settings = {"num_generations": 1, "per_device_train_batch_size": 4, **settings}
    return tiny.trainer(tiny.recorded(trainer_class), tmp_path, reward, **settings)


def rewards_by_token(trainer: Any) -> list[tuple[list[int], list[float]]]:
    """Completions that were trained on, with the reward of each token."""
    return [
        (ids, batch.output["returns"][row, : len(ids)].tolist())
        for batch in trainer.batches
        for row, ids in enumerate(batch.completions)
    ]


def a_token(ids: list[int]) -> list[float]:
    return [token / 8 for token in ids]


def a_step(ids: list[int]) -> list[tuple[int, float]]:
    """At the first token and at every seventh word, in no order."""
    return [(i, 1.0 + i) for i, token in reversed(list(enumerate(ids))) if token % 7 == 0] + [(0, ids[0] / 4)]


def outcome(ids: list[int]) -> float:
    return tiny.hashed([ids])[0]


def asked(func: Any) -> Any:
    def reward(completion_ids: list[list[int]], **columns: Any) -> list[Any]:
        return [func(ids) for ids in completion_ids]

    reward.__name__ = func.__name__
    return reward


def spread(ids: list[int], answer: Any, weight: float = 1.0) -> list[float]:
    """What `answer` gives to each token."""
    earned = [0.0] * len(ids)
    if answer is None:
        return earned
    if isinstance(answer, float):
        answer = [(len(ids) - 1, answer)]
    elif answer and not isinstance(answer[0], tuple):
        answer = enumerate(answer)
    for position, reward in answer:
        earned[position] += weight * reward
    return earned


def together(*parts: list[float]) -> list[float]:
    return [sum(of_token) for of_token in zip(*parts, strict=True)]


@pytest.mark.train
@pytest.mark.parametrize("func", [a_token, a_step, outcome])
@pytest.mark.parametrize("fit", [True, False])
def test_every_step_arrives_at_its_token(func, fit, tmp_path):
    trainer = build(PPOTrainer, tmp_path, asked(func), fit_micro_batches=fit, **OWN)
    trainer.train()
    for ids, earned in rewards_by_token(trainer):
        assert earned == pytest.approx(spread(ids, func(ids)), abs=1e-5)
    assert len({len(ids) for ids, _ in rewards_by_token(trainer)}) > 1


def sometimes(ids: list[int]) -> float | None:
    return None if ids[0] % 2 else outcome(ids)


def sometimes_by_step(ids: list[int]) -> list[tuple[int, float]] | None:
    return None if ids[0] % 3 else a_step(ids)


@pytest.mark.train
def test_functions_have_weights_and_may_not_apply(tmp_path):
    funcs, weights = [a_token, sometimes, sometimes_by_step], [0.5, -2.0, 3.0]
    trainer = build(PPOTrainer, tmp_path, [asked(func) for func in funcs], reward_weights=weights, **OWN)
    trainer.train()
    answers = [[func(ids) for func in funcs] for ids, _ in rewards_by_token(trainer)]
    assert any(None in answer for answer in answers) and any(None not in answer for answer in answers)
    for ids, earned in rewards_by_token(trainer):
        parts = [
            spread(ids, func(ids), weight)
            for func, weight in zip(funcs, weights, strict=True)
            if func is not sometimes
        ]
        answer = sometimes(ids)
        parts.append(spread(ids, None if answer is None else -2.0 * answer))
        assert earned == pytest.approx(together(*parts), abs=1e-5)


@pytest.mark.train
def test_two_functions_of_one_name_keep_their_weights(tmp_path):
    first, second = asked(a_token), asked(a_step)
    first.__name__ = second.__name__ = "judge"
    trainer = build(PPOTrainer, tmp_path, [first, second], reward_weights=[1.0, 10.0], **OWN)
    trainer.train()
    for ids, earned in rewards_by_token(trainer):
        assert earned == pytest.approx(together(spread(ids, a_token(ids)), spread(ids, a_step(ids), 10.0)), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_rewards_of_any_size(scale, tmp_path):
    funcs = [lambda ids: [scale * reward for reward in a_token(ids)], lambda ids: scale * outcome(ids)]
    for func in funcs:
        func.__name__ = "judge"
    trainer = build(PPOTrainer, tmp_path, [asked(func) for func in funcs], **{**OWN, "max_steps": 1})
    trainer.train()
    for ids, earned in rewards_by_token(trainer):
        expected = together(spread(ids, a_token(ids)), spread(ids, outcome(ids)))
        assert [reward / scale for reward in earned] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.train
def test_a_completion_that_nothing_scores_teaches_nothing(tmp_path):
    trainer = build(PPOTrainer, tmp_path, asked(sometimes), **{**OWN, "kl_coef": 0.1, "whiten_advantages": True})
    trainer.train()
    batch, seen = trainer.batches[0], set()
    for row, ids in enumerate(batch.completions):
        scored = sometimes(ids) is not None
        seen.add(scored)
        assert batch.output["advantages"][row].any() == scored
        assert scored or torch.equal(batch.output["returns"][row], batch.output["old_values"][row])
    assert seen == {True, False}


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {"rollout_selection": "refill"},
        {"rollout_selection": "duplicate"},
        {"rollout_selection": "refill", "rewards_in_flight": 2},
        {"rewards_in_flight": 2, "generation_chunks": 2},
    ],
    ids=["refill", "duplicate", "refill in flight", "in flight"],
)
@pytest.mark.parametrize("made_async", [False, True])
def test_steps_survive_selection_and_scoring_beside_generation(settings, made_async, tmp_path):
    def first(ids: list[int]) -> list[tuple[int, float]]:
        """A group is dead where all completions begin alike."""
        return [(0, float(ids[0] % 2)), (len(ids) - 1, 0.25), (0, -0.25)]

    def odd(ids: list[int]) -> float:
        return 0.5 * (ids[0] % 2)

    reward = asked(first)
    if made_async:

        async def judge(completion_ids: list[list[int]], **columns: Any) -> list[Any]:
            await asyncio.sleep(0.001)
            return [first(ids) for ids in completion_ids]

        reward = judge
    trainer = build(PPOTrainer, tmp_path, [asked(odd), reward], num_generations=2, **OWN, **settings)
    trainer.train()
    for ids, earned in rewards_by_token(trainer):
        assert earned == pytest.approx(together(spread(ids, odd(ids)), spread(ids, first(ids))), abs=1e-5)
    if "rollout_selection" in settings:
        copied = any(batch.selection.sources != list(range(4)) for batch in trainer.batches)
        refilled = any(len(batch.rounds) > 1 for batch in trainer.batches)
        assert copied if settings["rollout_selection"] == "duplicate" else refilled


@pytest.mark.train
def test_a_trainer_without_a_critic_takes_the_sum(tmp_path):
    ends = []
    for name, func in (("steps", a_step), ("sums", lambda ids: sum(reward for _, reward in a_step(ids)))):
        func.__name__ = "judge"
        trainer = build(GRPOTrainer, tmp_path / name, asked(func), num_generations=4, max_steps=2)
        trainer.train()
        ends.append((tiny.weights(trainer.model), [log["reward"] for log in tiny.history(trainer)]))
    a_step.__name__ = "a_step"
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())


@pytest.mark.parametrize("trainer_class", [PPOTrainer, GRPOTrainer])
def test_steps_that_do_not_fit_their_completion_are_named_with_it(trainer_class, tmp_path):
    def reward(completion_ids: list[list[int]], trainer_state: Any, **columns: Any) -> list[Any]:
        answers: list[Any] = [a_token(ids) for ids in completion_ids]
        if trainer_state.global_step == 1:
            answers[3] = answers[3] + [1.0]
        return answers

    settings = {"num_iterations": 1, "max_steps": 3}
    trainer = build(trainer_class, tmp_path, reward, num_generations=4, **settings)
    with pytest.raises(RewardFunctionError) as error:
        trainer.train()
    message = str(error.value)
    ids = re.search(r"completion_ids: \[(.*)\]", message)
    assert ids
    length = len(ids.group(1).split(","))
    assert f"`reward` returned step rewards {length + 1} for a completion of {length} tokens" in message
    assert re.search(r"prompts: 'w\d+ w\d+'", message)
    assert (tmp_path / "checkpoint-1").exists()


def test_a_reward_by_step_is_logged_as_its_sum(tmp_path):
    trainer = build(PPOTrainer, tmp_path, asked(a_step), **{**OWN, "max_steps": 1})
    trainer.train()
    sums = [float(StepRewards(a_step(ids))) for ids, _ in rewards_by_token(trainer)]
    (log,) = tiny.history(trainer)
    assert log["reward"] == log["objective/scores"] == pytest.approx(sum(sums) / len(sums))


# Truncated completions that are left out


def cut_off_at(step: int | None) -> Any:
    """A rollout function: about half of the completions end, and none does in the generation batch of `step`."""

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        completions = [[4 + (3 * i + trainer.state.global_step) % 20, 5 + i] for i in range(len(prompts))]
        for ids in completions[::2] if trainer.state.global_step != step else []:
            ids[-1] = 2
        prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    return rollouts


@pytest.mark.train
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_where_every_completion_is_cut_off_no_step_moves_the_policy(tmp_path, late):
    gradients = Gradients()
    sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1} if late else {}
    trainer = tiny.trainer(
        tiny.recorded(PPOTrainer),
        tmp_path,
        tiny.hashed,
        {"rollout_func": cut_off_at(1), "callbacks": [gradients], "ref_model": tiny.stopping(3)},
        **{"mask_truncated_completions": True, "num_generations": 1, "num_iterations": 1, "max_steps": 3},
        **{"kl_target": 0.5, "kl_rule": "ppo", "whiten_rewards": True, **sizes},
    )
    assert trainer.may_credit_late is late
    trainer.train()
    moved = [any(grad.abs().max() > 0 for grad in step.values()) for step in gradients.steps]
    assert moved == [True, False, True]
    logs = tiny.history(trainer)
    assert [log["objective/kl"] is None for log in logs] == [False, True, False]
    assert logs[1]["loss"] == logs[1]["loss/value_avg"] == 0.0
    coefficients = [log["objective/kl_coef"] for log in logs]
    assert coefficients[0] != coefficients[1] == coefficients[2]  # nothing was measured in the second step
    for log in logs:  # of all completions, those that are left out among them
        assert log["objective/scores"] == pytest.approx(log["reward"], rel=1e-5)
        assert all(math.isfinite(value) for value in log.values() if value is not None)
    assert all(value.isfinite().all() for value in tiny.weights(trainer.model).values())
