"""Rewards computed ahead are those that one call on everything gives, whatever finishes first and whatever fails."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl.trainer.utils import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

from trl_ext.rewards.ahead import BROKEN_AFTER, RewardsAhead
from trl_ext.rewards.guard import FAILED, guard


SOON = 0.3  # seconds; for what has to run out, and far more than anything else takes
PATIENCE = 20  # seconds; for what only runs out where the code is broken


@pytest.fixture(scope="module")
def loop():
    thread, loop, ready = start_event_loop_in_daemon(name="rewards")
    ready.wait()
    yield loop
    shutdown_event_loop_in_daemon(thread, loop)


@pytest.fixture(params=["sync", "async"])
def kind(request) -> str:
    return request.param


def made_async(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func` in a thread, so that it may wait for another call."""

    async def judged(**columns: Any) -> Any:
        return await asyncio.to_thread(func, **columns)

    return judged


def guarded(func: Callable[..., Any], kind: str = "sync", name: str = "judge") -> Any:
    return guard(func if kind == "sync" else made_async(func), name)


class Logs:
    """TRL's callbacks."""

    def __init__(self) -> None:
        self.extras: defaultdict[str, list[Any]] = defaultdict(list)
        self.metrics: list[tuple[str, float]] = []

    def log_extra(self, column: str, values: list[Any]) -> None:
        self.extras[column].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.append((name, value))


STATE = object()


def columns_of(numbers: range, logs: Logs | None = None) -> dict[str, Any]:
    logs = logs or Logs()
    return {
        "prompts": [f"{number} + 0" for number in numbers],
        "completions": [str(number) for number in numbers],
        "completion_ids": [[number] for number in numbers],
        "answer": list(numbers),
        "trainer_state": STATE,
        "log_extra": logs.log_extra,
        "log_metric": logs.log_metric,
    }


def halves(answer: list[int], **columns: Any) -> list[float]:
    return [number / 2 for number in answer]


class OutOfOrder:
    """Halves; the group that starts with 0 comes back only after `others` groups have."""

    def __init__(self, others: int) -> None:
        self.left = others
        self.done = threading.Event()

    def __call__(self, answer: list[int], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
        if answer[0] == 0:
            assert self.done.wait(PATIENCE)
        log_extra("seen", [f"saw {number}" for number in answer])
        log_metric("first", answer[0])
        self.left -= 1
        if self.left == 0:
            self.done.set()
        return halves(answer)


def test_the_same_as_one_call_on_everything(kind, loop):
    ahead = RewardsAhead([guarded(halves, kind)], in_flight=3, loop=loop)
    for chunk in (range(0, 3), range(3, 11), range(11, 12)):  # groups of 2, and shorter ones
        ahead.submit(columns_of(chunk), group_size=2)
    assert ahead.collect() == [[number / 2 for number in range(12)]]
    assert ahead.faults == []


def test_order_of_arrival_changes_nothing(kind, loop):
    logs = Logs()
    # One call at a time would have the first group wait forever
    ahead = RewardsAhead([guarded(OutOfOrder(others=3), kind)], in_flight=2, loop=loop)
    ahead.submit(columns_of(range(8), logs), group_size=2)
    assert ahead.collect() == [[number / 2 for number in range(8)]]
    assert logs.extras == {"seen": [f"saw {number}" for number in range(8)]}
    assert logs.metrics == [("first", 0), ("first", 2), ("first", 4), ("first", 6)]


def test_logs_come_in_trls_order(loop):
    # Function by function, async ones last, however they are listed
    def told_by(name: str) -> Callable[..., Any]:
        def judged(answer: list[int], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
            log_metric(name, answer[0])
            log_extra("shared", [f"{name} {number}" for number in answer])
            return halves(answer)

        return judged

    logs = Logs()
    funcs = [guarded(told_by(name), kind) for name, kind in [("a", "async"), ("b", "sync"), ("c", "sync")]]
    ahead = RewardsAhead(funcs, in_flight=4, loop=loop)
    ahead.submit(columns_of(range(4), logs), group_size=2)
    assert logs.metrics == []  # not from the threads
    ahead.collect()
    assert logs.metrics == [(name, number) for name in "bca" for number in (0, 2)]
    # as TRL has it where two functions log one column
    assert logs.extras["shared"] == [f"{name} {number}" for name in "bca" for number in range(4)]


def test_extra_columns_stay_aligned():
    def sparse(answer: list[int], log_extra: Any, **columns: Any) -> list[float]:
        if answer[0] == 2:
            log_extra("note", ["two", "three"])
        if answer[0] == 4:
            log_extra("few", ["four"])
        if answer[0] == 6:
            for number in answer:  # one by one, and too many
                log_extra("note", [f"number {number}"])
            log_extra("note", ["more"])
        return halves(answer)

    logs = Logs()
    ahead = RewardsAhead([guarded(sparse)], in_flight=4)
    ahead.submit(columns_of(range(8), logs), group_size=2)
    ahead.collect()
    assert logs.extras == {
        "note": [None, None, "two", "three", None, None, "number 6", "number 7"],
        "few": [None] * 4 + ["four"] + [None] * 3,
    }


def test_arguments_are_trls(kind, loop):
    seen = []

    def looks(**columns: Any) -> list[float]:
        seen.append(columns)
        return [0.0] * len(columns["prompts"])

    ahead = RewardsAhead([guarded(looks, kind)], in_flight=1, loop=loop)
    ahead.submit({**columns_of(range(5)), "shared": [1, 2, 3]}, group_size=2)
    ahead.collect()
    assert [columns["answer"] for columns in seen] == [[0, 1], [2, 3], [4]]  # one at a time: in order
    for columns, rows in zip(seen, (range(0, 2), range(2, 4), range(4, 5)), strict=True):
        expected = {**columns_of(rows), "shared": [1, 2, 3]}
        assert columns.keys() == expected.keys()
        for callback in ("log_extra", "log_metric"):
            assert callable(columns.pop(callback))
            del expected[callback]
        assert columns == expected


@pytest.mark.parametrize("kinds", [["sync"], ["async"], ["sync", "async"], ["async", "async", "sync"]], ids=str)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_as_many_in_flight_as_allowed(kinds, in_flight, loop):
    lock = threading.Lock()
    together = threading.Barrier(in_flight)  # opens only where all of them run at the same time
    began, go = threading.Semaphore(0), threading.Event()
    running, most = 0, 0

    def counts(answer: list[int], **columns: Any) -> list[float]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        began.release()
        assert go.wait(PATIENCE)
        together.wait(PATIENCE)
        with lock:
            running -= 1
        return halves(answer)

    ahead = RewardsAhead([guarded(counts, kind) for kind in kinds], in_flight, loop=loop)
    ahead.submit(columns_of(range(3)), group_size=1)
    ahead.submit(columns_of(range(3, 6)), group_size=1)
    for _ in range(in_flight):
        assert began.acquire(timeout=PATIENCE)
    assert not began.acquire(timeout=0.05)  # no other
    go.set()
    assert ahead.collect() == [[number / 2 for number in range(6)]] * len(kinds)
    assert most == in_flight
    assert ahead.faults == []


def test_submit_does_not_wait(kind, loop):
    go = threading.Event()

    def waits(answer: list[int], **columns: Any) -> list[float]:
        assert go.wait(PATIENCE)
        return halves(answer)

    ahead = RewardsAhead([guarded(waits, kind)], in_flight=1, loop=loop)
    ahead.submit(columns_of(range(4)), group_size=2)
    go.set()
    assert ahead.collect() == [[0.0, 0.5, 1.0, 1.5]]


# Faults


def failing_on(number: int, how: Callable[[], Any]) -> Callable[..., Any]:
    """Halves; `how` instead for the group with this number, after some logging."""

    def judged(answer: list[int], log_extra: Any, log_metric: Any, **columns: Any) -> Any:
        log_extra("seen", list(answer))
        log_metric("first", answer[0])
        return how() if number in answer else halves(answer)

    return judged


def raises() -> None:
    raise KeyError("no such judge")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (raises, ["KeyError: 'no such judge'", "for this sample", "3 + 0"]),
        (lambda: [0.5], ["1 rewards for 2 completions", "2 + 0"]),
        (lambda: [0.5] * 3, ["3 rewards for 2 completions", "2 + 0"]),
        (lambda: [0.0, float("nan")], ["nan", "finite", "3 + 0"]),
        (lambda: 1.0, ["list of 2 rewards"]),
    ],
    ids=["raises", "too few", "too many", "nan", "no list"],
)
def test_a_fault_costs_its_group(kind, loop, how, said):
    logs = Logs()
    funcs = [guarded(failing_on(3, how), kind, "judge"), guarded(halves, name="healthy")]
    ahead = RewardsAhead(funcs, in_flight=2, loop=loop)
    ahead.submit(columns_of(range(6), logs), group_size=2)
    assert ahead.collect() == [[0.0, 0.5, None, None, 2.0, 2.5], [number / 2 for number in range(6)]]
    (fault,) = ahead.faults
    assert (fault.name, fault.rows) == ("judge", range(2, 4))
    for part in ("`judge`", *said):
        assert part in fault.message
    assert funcs[0].fault is None  # that would stop the run
    # Nothing of the failed group, nor of the attempts to find its sample
    assert logs.extras == {"seen": [0, 1, None, None, 4, 5]}
    assert logs.metrics == [("first", 0), ("first", 4)]
    ahead.submit(columns_of(range(2)), group_size=2)
    ahead.collect()
    assert ahead.faults == []


class Scripted:
    """Halves; raises for the groups of one that are `bad`."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def __call__(self, answer: list[int], **columns: Any) -> list[float]:
        if answer[0] in self.bad:
            raises()
        return halves(answer)


def collected(ahead: RewardsAhead, groups: range) -> list[float | None]:
    """Rewards of the first function for one batch, in groups of one."""
    ahead.submit(columns_of(groups), group_size=1)
    return ahead.collect()[0]


def test_failing_on_every_group_is_broken(kind, loop):
    funcs = [guarded(lambda **columns: raises(), kind, "broken"), guarded(halves, name="healthy")]
    logs, rows = Logs(), 2 * BROKEN_AFTER
    ahead = RewardsAhead(funcs, in_flight=2, loop=loop)
    ahead.submit(columns_of(range(rows), logs), group_size=2)
    assert ahead.collect() == [[FAILED] * rows, [number / 2 for number in range(rows)]]
    assert [fault.rows for fault in ahead.faults] == [range(row, row + 2) for row in range(0, rows, 2)]
    assert funcs[0].fault == ahead.faults[0].message
    assert "0 + 0" in funcs[0].fault
    assert funcs[1].fault is None


def test_a_few_groups_that_fail_are_an_unlucky_batch(kind, loop):
    # The next ones decide
    judge = guarded(lambda **columns: raises(), kind)
    ahead = RewardsAhead([judge], in_flight=2, loop=loop)
    for batch in range(BROKEN_AFTER - 1):
        assert collected(ahead, range(batch, batch + 1)) == [None]
        assert len(ahead.faults) == 1
        assert judge.fault is None
    assert collected(ahead, range(7, 8)) == [FAILED]
    assert "7 + 0" in judge.fault


def test_a_batch_is_broken_as_a_whole_or_not():
    # Many in a row, but the first of the batch was scored: the others may be as good as that
    judge = guarded(Scripted(set(range(1, 8))))
    ahead = RewardsAhead([judge], in_flight=1)
    assert collected(ahead, range(7)) == [0.0] + [None] * 6
    assert judge.fault is None
    assert collected(ahead, range(7, 8)) == [FAILED]


def test_one_that_works_is_a_new_beginning():
    judge = guarded(Scripted({0, 1, 2, 4, 5, 6}))
    ahead = RewardsAhead([judge], in_flight=1)
    assert collected(ahead, range(3)) == [None] * 3
    assert collected(ahead, range(3, 4)) == [1.5]
    assert collected(ahead, range(4, 7)) == [None] * 3
    assert judge.fault is None


def test_failures_are_counted_by_function(kind, loop):
    # Two that fail in turn are both alive
    funcs = [guarded(Scripted({0, 1, 4, 5}), kind, "low"), guarded(Scripted({2, 3, 6, 7}), kind, "high")]
    ahead = RewardsAhead(funcs, in_flight=1, loop=loop)
    for start in range(0, 8, 2):
        collected(ahead, range(start, start + 2))
        assert len(ahead.faults) == 2
    assert [func.fault for func in funcs] == [None, None]


def test_not_applicable_is_no_fault(kind, loop):
    ahead = RewardsAhead([guarded(lambda prompts, **columns: [None] * len(prompts), kind)], in_flight=2, loop=loop)
    ahead.submit(columns_of(range(4)), group_size=2)
    assert ahead.collect() == [[None] * 4]
    assert ahead.faults == []


def test_rewards_become_floats():
    # all that TRL takes
    outputs = {0: torch.tensor([0.25, 1.0]), 2: (True, 3), 4: (x for x in (None, 0.5))}
    ahead = RewardsAhead([guarded(lambda answer, **columns: outputs[answer[0]])], in_flight=1)
    ahead.submit(columns_of(range(6)), group_size=2)
    (rewards,) = ahead.collect()
    assert rewards == [0.25, 1.0, 1.0, 3.0, None, 0.5]
    assert {type(reward) for reward in rewards} == {float, type(None)}


class Hangs:
    """Halves; waits for `go` on the group with 0, then logs and returns."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.began = threading.Event()
        self.thread: threading.Thread | None = None
        self.asked: list[list[int]] = []

    def __call__(self, answer: list[int], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
        self.asked.append(answer)
        if 0 in answer:
            self.thread = threading.current_thread()
            self.began.set()
            assert self.go.wait(PATIENCE)
        log_extra("seen", list(answer))
        log_metric("first", answer[0])
        return halves(answer)


def test_a_sync_timeout_costs_its_group_and_frees_its_slot():
    logs, slow = Logs(), Hangs()
    judge = guarded(slow)
    ahead = RewardsAhead([judge], in_flight=1, timeout=SOON)
    ahead.submit(columns_of(range(4), logs), group_size=2)
    assert ahead.collect() == [[None, None, 1.0, 1.5]]
    (fault,) = ahead.faults
    assert fault.rows == range(0, 2)
    for part in ("`judge`", "took longer than 0.3 seconds", "0 + 0"):
        assert part in fault.message
    assert "1 + 0" not in fault.message
    assert judge.fault is None
    assert slow.thread.daemon  # or it would keep the interpreter from exiting
    slow.go.set()


def test_an_async_timeout_cancels(loop):
    cancelled = threading.Event()

    async def slow(answer: list[int], **columns: Any) -> list[float]:
        if 0 in answer:
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return halves(answer)

    ahead = RewardsAhead([guard(slow, "judge")], in_flight=1, timeout=SOON, loop=loop)
    ahead.submit(columns_of(range(4)), group_size=2)
    assert ahead.collect() == [[None, None, 1.0, 1.5]]
    assert "took longer than 0.3 seconds" in ahead.faults[0].message
    assert cancelled.wait(PATIENCE)


def test_an_async_function_that_blocks_the_loop_times_out(loop):
    go = threading.Event()

    async def blocks(answer: list[int], **columns: Any) -> list[float]:
        assert go.wait(PATIENCE)
        return halves(answer)

    ahead = RewardsAhead([guard(blocks, "judge")], in_flight=1, timeout=SOON, loop=loop)
    ahead.submit(columns_of(range(1)), group_size=1)
    rewards = ahead.collect()
    go.set()
    assert rewards == [[None]]
    assert "took longer than 0.3 seconds" in ahead.faults[0].message


def test_late_results_are_dropped():
    logs, slow = Logs(), Hangs()
    ahead = RewardsAhead([guarded(slow)], in_flight=2, timeout=SOON)
    ahead.submit(columns_of(range(2), logs), group_size=1)
    hung = ahead._calls[0][0]
    with ahead._changed:
        ahead._changed.wait_for(lambda: hung.settled, PATIENCE)
    slow.go.set()
    slow.thread.join(PATIENCE)  # back before anyone collects
    assert ahead.collect() == [[None, 0.5]]
    assert len(ahead.faults) == 1
    assert logs.extras == {"seen": [None, 1]}
    assert logs.metrics == [("first", 1)]


def test_the_timeout_bounds_the_search_for_the_sample(kind, loop):
    go = threading.Event()

    def slow_alone(answer: list[int], **columns: Any) -> list[float]:
        if answer == [2, 3]:
            raise RuntimeError("bad batch")
        if len(answer) == 1:
            assert go.wait(PATIENCE)
        return halves(answer)

    ahead = RewardsAhead([guarded(slow_alone, kind)], in_flight=1, timeout=SOON, loop=loop)
    ahead.submit(columns_of(range(4)), group_size=2)
    assert ahead.collect() == [[0.0, 0.5, None, None]]
    go.set()
    message = ahead.faults[0].message  # what is known already is worth more than that time ran out
    assert "RuntimeError: bad batch (on the whole batch; here is its first sample)" in message
    assert "2 + 0" in message


def test_waiting_in_line_takes_no_time(kind, loop):
    # Each call takes a fraction of what it may; together they take longer
    def takes_a_while(answer: list[int], **columns: Any) -> list[float]:
        threading.Event().wait(SOON / 6)
        return halves(answer)

    ahead = RewardsAhead([guarded(takes_a_while, kind)], in_flight=1, timeout=SOON, loop=loop)
    ahead.submit(columns_of(range(9)), group_size=1)
    assert ahead.collect() == [[number / 2 for number in range(9)]]


def test_cancelled_from_within_is_a_fault(loop):
    async def cancelled(answer: list[int], **columns: Any) -> list[float]:
        if 0 in answer:
            raise asyncio.CancelledError
        return halves(answer)

    ahead = RewardsAhead([guard(cancelled, "judge")], in_flight=1, loop=loop)
    ahead.submit(columns_of(range(2)), group_size=1)
    assert ahead.collect() == [[None, 0.5]]
    assert "was cancelled" in ahead.faults[0].message


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_no_fault(kind, stop, loop):
    def stops(answer: list[int], **columns: Any) -> list[float]:
        raise stop

    async def stops_on_the_loop(**columns: Any) -> list[float]:
        return stops(**columns)

    func = guard(stops if kind == "sync" else stops_on_the_loop, "judge")
    ahead = RewardsAhead([func, guarded(halves)], in_flight=1, loop=loop)
    ahead.submit(columns_of(range(2)), group_size=1)
    with pytest.raises(stop):
        ahead.collect()
    assert ahead.collect() == [[], []]


# From one batch to the next


@pytest.mark.parametrize("drop", [RewardsAhead.discard, RewardsAhead.close], ids=["discard", "close"])
def test_discard(kind, loop, drop):
    logs, slow = Logs(), Hangs()
    ahead = RewardsAhead([guarded(slow, kind)], in_flight=1, loop=loop)
    ahead.submit(columns_of(range(6), logs), group_size=2)
    assert slow.began.wait(PATIENCE)
    drop(ahead)
    assert ahead.collect() == [[]]
    ahead.submit(columns_of(range(6, 9), logs), group_size=2)
    slow.go.set()
    if kind == "sync":
        slow.thread.join(PATIENCE)
    assert ahead.collect() == [[3.0, 3.5, 4.0]]
    assert logs.extras == {"seen": [6, 7, 8]}
    assert slow.asked == [[0, 1], [6, 7], [8]]  # not for what was still in line
    assert ahead.faults == []


def test_discard_cancels_async_calls(loop):
    began, cancelled = threading.Event(), threading.Event()

    async def slow(**columns: Any) -> list[float]:
        began.set()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            cancelled.set()
        return []

    ahead = RewardsAhead([guard(slow, "judge")], in_flight=1, loop=loop)
    ahead.submit(columns_of(range(1)), group_size=1)
    assert began.wait(PATIENCE)
    ahead.discard()
    assert cancelled.wait(PATIENCE)


def test_what_was_discarded_never_begins(loop):
    blocked, go, calls = threading.Event(), threading.Event(), []

    async def counts(answer: list[int], **columns: Any) -> list[float]:
        calls.append(answer)
        return halves(answer)

    loop.call_soon_threadsafe(lambda: blocked.set() or go.wait(PATIENCE))
    assert blocked.wait(PATIENCE)
    ahead = RewardsAhead([guard(counts, "judge")], in_flight=1, loop=loop)
    ahead.submit(columns_of(range(1)), group_size=1)
    ahead.discard()
    ahead.submit(columns_of(range(1, 2)), group_size=1)
    go.set()
    assert ahead.collect() == [[0.5]]
    assert calls == [[1]]


def test_nothing_submitted():
    judge = guarded(halves)
    before = threading.active_count()
    ahead = RewardsAhead([judge], in_flight=4, timeout=PATIENCE)
    ahead.submit(columns_of(range(0)), group_size=4)
    assert ahead.collect() == [[]]
    assert judge.fault is None  # it failed on nothing
    assert threading.active_count() == before


def test_threads_end_with_their_calls():
    before = set(threading.enumerate())
    ahead = RewardsAhead([guarded(halves)], in_flight=4, timeout=PATIENCE)
    ahead.submit(columns_of(range(8)), group_size=2)
    ahead.collect()
    for thread in set(threading.enumerate()) - before:  # timers as well
        thread.join(PATIENCE / 2)
        assert not thread.is_alive()


def test_what_is_collected_is_what_the_guard_hands_out(kind, loop):
    calls = []
    judge = guarded(lambda answer, **columns: calls.append(answer) or halves(answer), kind)
    ahead = RewardsAhead([judge], in_flight=2, loop=loop)
    ahead.submit(columns_of(range(4)), group_size=2)
    (judge.ready,) = ahead.collect()
    output = judge(**columns_of(range(4)))
    assert (asyncio.run(output) if kind == "async" else output) == [0.0, 0.5, 1.0, 1.5]
    assert len(calls) == 2


def test_threads_use_the_device_of_the_process(monkeypatch):
    # A new thread begins on device 0
    chosen = threading.local()
    chosen.device = 3
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: getattr(chosen, "device", 0))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: setattr(chosen, "device", device))
    ahead = RewardsAhead(
        [guarded(lambda prompts, **columns: [torch.accelerator.current_device_index()] * len(prompts))], in_flight=2
    )
    ahead.submit(columns_of(range(2)), group_size=1)
    assert ahead.collect() == [[3.0, 3.0]]


@pytest.mark.parametrize("in_flight", [0, -1])
def test_nothing_in_flight_is_refused(in_flight):
    with pytest.raises(ValueError, match="in_flight"):
        RewardsAhead([guarded(halves)], in_flight)


def test_async_without_a_loop_is_refused():
    with pytest.raises(ValueError, match="loop"):
        RewardsAhead([guarded(halves, "async")], in_flight=1)
