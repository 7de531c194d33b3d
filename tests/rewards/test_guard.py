"""What a reward function does wrong is named, with the sample; what it does right goes through as it is."""

import asyncio
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl.trainer.utils import is_async_callable

from trl_ext.rewards.guard import FAILED, RewardGuard, guard


COLUMNS = {
    "prompts": ["2 + 2", "3 + 3", "4 + 4"],
    "completions": ["four", "seven", "eight"],
    "completion_ids": [[4], [7], [8]],
    "answer": [4, 6, 8],
    "trainer_state": object(),  # not by sample
}


def made_async(func: Callable[..., Any]) -> Callable[..., Any]:
    async def judged(**columns: Any) -> Any:
        await asyncio.sleep(0)
        return func(**columns)

    return judged


@pytest.fixture(params=["sync", "async"])
def call(request):
    """Calls a guarded function on `COLUMNS`; returns what came back, and the fault."""

    def run(func: Callable[..., Any]) -> tuple[Any, str | None]:
        if request.param == "sync":
            guarded = guard(func, "judge")
            return guarded(**COLUMNS), guarded.fault
        guarded = guard(made_async(func), "judge")
        return asyncio.run(guarded(**COLUMNS)), guarded.fault

    return run


@pytest.mark.parametrize(
    "rewards",
    [[0.0, 1.0, 0.5], [None, 1.0, None], [None] * 3, [True, False, 1], torch.tensor([0.0, -1.0, 2.0]), (1, 2, 3)],
    ids=str,
)
def test_values_pass_through_unchanged(call, rewards):
    returned, fault = call(lambda **columns: rewards)
    assert returned is rewards
    assert fault is None


def test_arguments_pass_through_unchanged(call):
    seen = {}
    call(lambda **columns: seen.update(columns) or [0.0] * 3)
    assert seen == COLUMNS


def assert_failed(result: tuple[Any, str | None], *said: str) -> None:
    returned, fault = result
    assert returned == [FAILED] * 3  # one for each completion, so that TRL's own checks don't speak first
    for part in ("`judge`", *said):
        assert part in fault


def second_sample_only(**columns: Any) -> list[float]:
    if "seven" in columns["completions"]:
        raise KeyError("seven")
    return [0.0] * len(columns["completions"])


def test_exception_names_the_sample(call):
    result = call(second_sample_only)
    assert_failed(result, "KeyError", "'seven'", "3 + 3", "[7]", "answer: 6")
    assert "four" not in result[1]


def test_exception_on_the_batch_only(call):
    def no_batches(**columns: Any) -> list[float]:
        if len(columns["completions"]) > 1:
            raise RuntimeError("one at a time")
        return [0.0]

    assert_failed(call(no_batches), "RuntimeError: one at a time", "but on none of its first 3 samples alone", "2 + 2")


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_wrong_number(call, count):
    assert_failed(call(lambda **columns: [0.5] * count), f"{count} rewards", "3 completions", "`None`", "four")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), "0.5", 1j], ids=repr)
def test_not_a_finite_number(call, bad):
    assert_failed(call(lambda **columns: [None, bad, 1.0]), repr(bad), "finite", "seven")


@pytest.mark.parametrize("bad", [1e39, -1e39], ids=str)
def test_too_large_for_trls_float32(call, bad):
    # Finite in Python, infinite in the tensor that TRL puts it into: a group with −inf has advantages of 0, or of 3e38
    # if they aren't scaled
    assert_failed(call(lambda **columns: [0.0, bad, 1.0]), "1e+39", "seven")


def test_a_generator_is_taken(call):
    # as TRL takes it; checking its rewards must not use them up
    returned, fault = call(lambda **columns: (value / 2 for value in range(3)))
    assert list(returned) == [0.0, 0.5, 1.0]
    assert fault is None


@pytest.mark.parametrize("count", [2, 4])
def test_a_generator_of_the_wrong_length(call, count):
    assert_failed(call(lambda **columns: iter([1.0] * count)), f"{count} rewards", "3 completions")


@pytest.mark.parametrize("bad", [None, 0.5], ids=str)
def test_no_list_at_all(call, bad):
    assert_failed(call(lambda **columns: bad), "list of 3 rewards", repr(bad))


def test_long_values_are_cut(call):
    def complains(**columns: Any) -> None:
        raise ValueError

    guarded = guard(complains, "judge")
    guarded(**{**COLUMNS, "prompts": ["x" * 100_000] * 3})
    assert len(guarded.fault) < 5_000


class AsyncJudge:
    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)


@pytest.mark.parametrize(
    "func",
    [AsyncJudge(), functools.partial(AsyncJudge(), more=1), made_async(len)],
    ids=["object", "partial", "function"],
)
def test_async_stays_async(func):
    # TRL tells by this how to call it
    assert is_async_callable(guard(func, "judge"))


def test_sync_stays_sync():
    assert not is_async_callable(guard(second_sample_only, "judge"))


def test_guarding_twice_is_guarding_once():
    once = guard(second_sample_only, "judge")
    assert guard(once, "other") is once
    assert isinstance(once, RewardGuard)
    assert once.__name__ == "judge"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_no_fault(stop):
    def stops(**columns: Any) -> None:
        raise stop

    with pytest.raises(stop):
        guard(stops, "judge")(**COLUMNS)


@pytest.fixture(params=["sync", "async"])
def counted(request):
    """A guard, a way to call it on `COLUMNS`, and the calls that reached the function."""
    calls = []

    def func(**columns: Any) -> list[float]:
        calls.append(columns)
        return [0.0] * 3

    if request.param == "sync":
        guarded = guard(func, "judge")
        return guarded, lambda: guarded(**COLUMNS), calls
    guarded = guard(made_async(func), "judge")
    return guarded, lambda: asyncio.run(guarded(**COLUMNS)), calls


@pytest.mark.parametrize("ready", [[1.0, None, 0.5], [FAILED] * 3], ids=str)
def test_what_is_ready_is_handed_out_once(counted, ready):
    guarded, run, calls = counted
    guarded.ready = ready
    assert run() == ready
    assert calls == []
    assert guarded.fault is None
    assert run() == [0.0] * 3
    assert len(calls) == 1


@pytest.mark.parametrize("count", [0, 2, 4])
def test_ready_for_another_batch(counted, count):
    guarded, run, calls = counted
    guarded.ready = [1.0] * count
    with pytest.raises(ValueError, match=f"{count} rewards of `judge` are ready, for 3 completions"):
        run()
    assert calls == []
    assert guarded.ready is None


# Calls by hand


def lengths(completions, weight=1.0, **columns):
    if not completions:
        raise KeyError("nothing to measure")
    return [weight * len(completion) for completion in completions]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_by_hand_is_a_call_of_the_function(kind):
    async def later(*args, **columns):
        return lengths(*args, **columns)

    guarded = guard(lengths if kind == "sync" else later, "judge")

    def call(*args, **columns):
        returned = guarded(*args, **columns)
        return returned if kind == "sync" else asyncio.run(returned)

    guarded.ready = [5.0]  # for the trainer's next call, not for this one
    assert call(["four", "seven"]) == [4.0, 5.0]
    assert call(["four"], 0.5) == call(completions=["four"], weight=0.5) == [2.0]
    with pytest.raises(KeyError, match="nothing to measure"):
        call([])
    assert guarded.fault is None and guarded.returned == [] and guarded.ready == [5.0]
