"""Reward functions tried before there is a policy."""

from typing import Any

import pytest
import tiny

from trl_ext.run.trying import SHORT, completions_for, try_reward


ROWS = [{"prompt": "w1", "solution": "w2"}, {"prompt": "w3", "solution": "w4"}]


def tried(func: Any, rows: list[dict[str, Any]] = ROWS, removes_columns: bool = False):
    return try_reward(func, rows, tiny.tokenizer(), removes_columns)


def test_own_completions_short_ones_and_none():
    rows = [{"prompt": "a", "completion": " own"}, {"prompt": "b"}]
    assert completions_for(rows) == (["a", "a", "b", "b"], [" own", "", SHORT, ""])


def test_conversations_get_messages():
    answer = [{"role": "assistant", "content": "own"}]
    rows = [{"prompt": [{"role": "user", "content": "a"}], "chosen": answer}]
    assert completions_for(rows)[1] == [answer, [{"role": "assistant", "content": ""}]]


def test_a_function_gets_what_trl_passes():
    def seen(prompts, completions, completion_ids, solution, trainer_state, log_extra, log_metric):
        assert prompts == ["w1", "w1", "w3", "w3"] and solution == ["w2", "w2", "w4", "w4"]
        assert len(completions) == len(completion_ids) == 4 and completion_ids[1] == []
        log_extra("name", [1]), log_metric("name", 1.0)
        return [1, 0.5, 0.0, 0.25]

    found = tried(seen)
    assert found.fault is None and found.told.startswith("seen: 1, 0.5, 0, 0.25 in ")


def test_removed_columns_are_not_passed():
    def needs_solution(solution, **kwargs):
        return [0.0] * 4

    assert tried(needs_solution).fault is None
    assert "solution" in str(tried(needs_solution, removes_columns=True).fault)


def test_async_functions_are_awaited():
    async def later(prompts, **kwargs):
        return [1.0] * len(prompts)

    assert "later: 1, 1, 1, 1" in tried(later).told


def test_none_nan_and_steps():
    found = tried(lambda prompts, **kwargs: [None, float("nan"), 1.0, [0.5, 0.25]])
    assert found.fault is None and "None or nan for 2 of 5" in found.told and "[2 steps]" in found.told
    assert "none of these completions is judged" in tried(lambda **kwargs: [None] * 4).told


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        ([1.0], "1 rewards for 4 completions"),
        (1.0, "returns float"),
        (None, "returns NoneType"),
        (["1"] * 4, "'1', which is no reward"),
        ([float("inf")] * 4, "inf, which is no reward"),
    ],
)
def test_what_is_no_reward(returned, fault):
    assert fault in str(tried(lambda **kwargs: returned).fault)


def test_a_function_that_fails_is_named():
    def broken(**kwargs):
        raise KeyError("answer")

    assert tried(broken).fault == "`broken` fails: KeyError: 'answer'"


def test_models_are_not_loaded():
    assert tried("org/reward").told == "org/reward: a model, which isn't loaded"
