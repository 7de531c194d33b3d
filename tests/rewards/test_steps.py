"""Rewards by step: what is read from a reward function, and that nothing on the way loses the steps."""

import asyncio
import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from trl_ext.rewards.ahead import RewardsAhead
from trl_ext.rewards.guard import FAILED, guard
from trl_ext.rewards.steps import StepRewards, is_by_step, read_step_rewards


# What a function may return for a completion of 3 tokens, and the steps that it stands for
READABLE = {
    "a number a token": ([0.5, 0, -1], [(0, 0.5), (1, 0.0), (2, -1.0)]),
    "a tensor": (torch.tensor([0.5, 0.0, -1.0]), [(0, 0.5), (1, 0.0), (2, -1.0)]),
    "an array": (np.array([0.5, 0.0, -1.0], dtype=np.float32), [(0, 0.5), (1, 0.0), (2, -1.0)]),
    "numbers of numpy": ([np.float32(0.5), np.int64(0), True], [(0, 0.5), (1, 0.0), (2, 1.0)]),
    "pairs": ([(2, 1.5), (0, -1)], [(2, 1.5), (0, -1.0)]),
    "lists of two": ([[1, 2.0]], [(1, 2.0)]),
    "a tensor of pairs": (torch.tensor([[0.0, 1.0], [2.0, 3.0]]), [(0, 1.0), (2, 3.0)]),
    "two steps at one token": ([(1, 1.0), (1, 0.25)], [(1, 1.0), (1, 0.25)]),
    "no step": ([], []),
    "a generator": ((float(i) for i in range(3)), [(0, 0.0), (1, 1.0), (2, 2.0)]),
}

UNREADABLE = {
    "too few": ([1.0, 2.0], "2 for a completion of 3 tokens. Return one for each token"),
    "too many": ([0.0] * 4, "4 for a completion of 3 tokens"),
    "a pair among numbers": ([0.5, (1, 2.0), 0.0], "mixed"),
    "a triple": ([(0, 1.0, 2.0)], "mixed"),
    "beyond the end": ([(3, 1.0)], "at position 3 of a completion of 3 tokens"),
    "before the start": ([(-1, 1.0)], "at position -1 of"),
    "between two tokens": ([(0.5, 1.0)], "at position 0.5 of"),
    "nowhere": ([(math.nan, 1.0)], "at position nan of"),
    "nothing earned": ([0.0, None, 1.0], "with None among them"),
    "a pair of nothing": ([(0, None)], "with None among them"),
    "words": (["good", "bad", "good"], "with 'good' among them"),
    "a mapping": ({"first": 1.0, "second": 2.0, "third": 3.0}, "with 'first' among them"),
}


@pytest.mark.parametrize("case", READABLE)
def test_what_is_read(case):
    returned, steps = READABLE[case]
    reward = read_step_rewards(returned, 3)
    assert reward.steps == steps
    assert reward == pytest.approx(sum(value for _, value in steps))
    assert is_by_step(reward) and not is_by_step(float(reward))


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_refused(case):
    returned, said = UNREADABLE[case]
    with pytest.raises(ValueError) as error:
        read_step_rewards(returned, 3)
    assert said in str(error.value)


def test_a_sum_that_remembers_its_steps():
    reward = StepRewards([(0, 1.0), (4, -0.25)])
    assert isinstance(reward, float) and reward == 0.75
    assert torch.tensor([reward, 1.0]).tolist() == [0.75, 1.0]
    for copied in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert copied == reward and copied.steps == reward.steps


# Through the guard


COLUMNS: dict[str, Any] = {
    "prompts": ["2 + 2", "3 + 3"],
    "completions": ["four", "a seven"],
    "completion_ids": [[4], [9, 7]],
}


@pytest.mark.parametrize("made_async", [False, True])
def test_a_guard_reads_steps_and_leaves_the_rest(made_async):
    def judge(**columns: Any) -> list[Any]:
        return [[0.5], None]

    async def judge_later(**columns: Any) -> list[Any]:
        return [None, [(1, 2.0)]]

    if made_async:
        guarded = guard(judge_later, "judge")
        returned = asyncio.run(guarded(**COLUMNS))
        assert returned[0] is None and returned[1].steps == [(1, 2.0)]
    else:
        guarded = guard(judge, "judge")
        returned = guarded(**COLUMNS)
        assert returned[0].steps == [(0, 0.5)] and returned[1] is None
    assert guarded.fault is None
    assert guarded.returned is returned


def test_tensors_of_one_number_are_numbers():
    # `list(model(...).logits)`: TRL takes it, whatever the completions' lengths
    returned = guard(lambda **columns: list(torch.tensor([[0.5], [2.0]])), "judge")(**COLUMNS)
    assert torch.tensor(returned).tolist() == [0.5, 2.0]
    assert not any(map(is_by_step, returned))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ([1.0], "returned step rewards 1 for a completion of 2 tokens"),
        ([(2, 1.0)], "returned step rewards at position 2 of a completion of 2 tokens"),
        ([0.0, None], "returned step rewards with None among them"),
        ([0.0, math.nan], "returned nan"),
        ([(0, math.inf), (1, -math.inf)], "returned nan"),
        ([(0, 3e38), (1, 3e38)], "returned 6e+38"),
        ([(0, 1e39), (1, -1e39)], "returned 0.0"),
    ],
)
def test_a_guard_names_the_sample_with_wrong_steps(second, said):
    guarded = guard(lambda **columns: [[0.5], second], "judge")
    assert guarded(**COLUMNS) == [FAILED] * 2
    assert guarded.fault is not None
    assert "`judge`" in guarded.fault and said in guarded.fault
    assert "prompts: '3 + 3'" in guarded.fault and "completion_ids: [9, 7]" in guarded.fault


def test_steps_survive_scoring_beside_generation():
    ahead = RewardsAhead([guard(lambda completion_ids, **columns: [[(0, 1.0)] for _ in completion_ids], "judge")], 2)
    for start in (0, 1):
        ahead.submit({key: value[start : start + 1] for key, value in COLUMNS.items()}, group_size=1)
    (rewards,) = ahead.collect()
    assert [reward.steps for reward in rewards] == [[(0, 1.0)]] * 2
