"""
Computes rewards of finished completions in the background while the next completions are generated. Results and logs
are returned in the order of submission, whatever the order in which calls return.
"""

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import chain
from typing import Any, NamedTuple

import torch

from ..errors import require
from .guard import FAILED, AsyncRewardGuard, RewardGuard, cut_columns, describe_fault
from .steps import is_by_step


# A function is taken for broken if it failed on at least this many groups in a row, including all groups of the latest
# batch. A batch alone may be an unlucky one: a round of refilling can consist of one group.
BROKEN_AFTER = 4


class RewardFault(NamedTuple):
    """
    A failed call of a reward function.

    Args:
        name (`str`):
            Name of the function.
        rows (`range`):
            The completions that get no reward from it, counted over the batch in the order of submission.
        message (`str`):
            What happened, and for which sample.
    """

    name: str
    rows: range
    message: str


class _Call:
    """A call of one function on one group, and what the function logs during it."""

    def __init__(self, func: RewardGuard, columns: dict[str, Any]) -> None:
        self.guard = type(func)(func.func, func.__name__)  # a guard whose `fault` belongs to this call alone
        self.size = len(columns["prompts"])
        self.extras: defaultdict[str, list[Any]] = defaultdict(list)
        self.metrics: list[tuple[str, float]] = []
        recorders = {
            "log_extra": lambda column, values: self.extras[column].extend(values),
            "log_metric": lambda name, value: self.metrics.append((name, value)),
        }
        self.columns = {key: recorders.get(key, value) for key, value in columns.items()}
        self.settled = False  # whatever the call returns after that is dropped
        self.rewards: list[float | None] = [None] * self.size
        self.fault: str | None = None
        self.timed_out = False
        self.stop: BaseException | None = None
        self.timer: threading.Timer | None = None
        self.future: Future[None] | None = None

    def rewards_of(self, output: Any) -> list[float | None]:
        return [
            None if reward is None or self.guard.fault else reward if is_by_step(reward) else float(reward)
            for reward in output
        ]

    def fault_of(self, problem: str) -> str:
        return describe_fault(self.guard.__name__, f"{problem}. The first completion:", self.columns, 0)

    def extra(self, column: str) -> list[Any]:
        """What was logged in a column, with one value for each completion; `None` where there is none."""
        values = [] if self.fault else self.extras.get(column, [])
        return [*values, *[None] * self.size][: self.size]


class RewardsAhead:
    """
    Calls reward functions on finished groups in the background. Sync functions run in threads, so that several calls
    of the same function can run at the same time; async functions run on an event loop. Nothing is started before the
    first [`submit`].

    If a call fails or takes too long, all completions of its group have no reward from this function (`None`: does not
    apply), and the failure is listed in `faults`. If a function failed on all groups, and on at least `BROKEN_AFTER`
    in a row, it is taken for broken: all its rewards are [`FAILED`], and `fault` is set on its guard.

    Args:
        funcs (`list[RewardGuard]`):
            The functions in the trainer's order, without reward models.
        in_flight (`int`):
            Number of calls that run at the same time, over all functions. Further calls wait in the order of
            submission.
        timeout (`float`, *optional*):
            Seconds that one call may take. After that, an async call is cancelled. A sync call can't be cancelled: its
            thread keeps running, but no longer counts as in flight.
        loop (`asyncio.AbstractEventLoop`, *optional*):
            The event loop for async functions: TRL's `async_loop`, which runs in a thread of its own.
        tolerates_errors (`bool`, *optional*, defaults to `True`):
            Whether a call that raises costs only its own group the reward. `False`: the function then counts as
            broken, as it does without calls ahead. Calls that take too long are tolerated in any case.

    Attributes:
        faults (`list[RewardFault]`):
            Failed calls of the batch that [`collect`] returned last.

    Raises:
        ValueError: if `in_flight` is less than 1, or if a function is async and there is no loop.
    """

    def __init__(
        self,
        funcs: list[RewardGuard],
        in_flight: int,
        timeout: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        tolerates_errors: bool = True,
    ) -> None:
        require(in_flight >= 1, f"in_flight={in_flight} must be at least 1.")
        require(
            loop is not None or not any(isinstance(func, AsyncRewardGuard) for func in funcs),
            "Async reward functions need an event loop on which to run. Pass `loop`.",
        )
        self.funcs = funcs
        self.in_flight = in_flight
        self.timeout = timeout
        self.tolerates_errors = tolerates_errors
        self.loop = loop
        self.faults: list[RewardFault] = []
        self._failures = dict.fromkeys(range(len(funcs)), 0)  # how many in a row, by function
        self._calls: list[list[_Call]] = [[] for _ in funcs]
        self._waiting: deque[_Call] = deque()
        self._running: set[_Call] = set()
        self._changed = threading.Condition()  # guards all attributes of the calls above
        self._loggers: dict[str, Callable[..., Any]] = {}
        self._device: int | None = None

    def submit(self, columns: dict[str, Any], group_size: int) -> None:
        """
        Queue finished completions, without waiting for their rewards.

        Args:
            columns (`dict[str, Any]`):
                The arguments as TRL passes them to a reward function. Lists with one value for each completion (as
                long as `prompts`) are cut by group; everything else is passed on as it is.
            group_size (`int`):
                Completions per group; the last group may have fewer.
        """
        if torch.accelerator.is_available():
            self._device = torch.accelerator.current_device_index()
        with self._changed:
            self._loggers = {key: columns[key] for key in ("log_extra", "log_metric") if key in columns}
            for start in range(0, len(columns["prompts"]), group_size):
                for func, calls in zip(self.funcs, self._calls, strict=True):
                    calls.append(_Call(func, cut_columns(columns, start, start + group_size)))
                    self._waiting.append(calls[-1])
            self._start_calls()

    def collect(self) -> list[list[float | None]]:
        """
        Wait for everything that was submitted since the last time, and pass on to TRL what the functions logged.

        Returns:
            `list[list[float | None]]`: for each function, the rewards of all completions in the order of submission,
            as a guard takes them in `ready`.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._running)
            by_func, self._calls = self._calls, [[] for _ in self.funcs]
        for call in chain.from_iterable(by_func):
            if call.stop is not None:
                raise call.stop
        # In TRL's order, which calls async functions after all others
        for index in sorted(range(len(self.funcs)), key=lambda i: isinstance(self.funcs[i], AsyncRewardGuard)):
            self._log(by_func[index])
        self.faults = []
        return [self._rewards(index, calls) for index, calls in enumerate(by_func)]

    @property
    def running(self) -> list[str]:
        """Names of the functions that are being called."""
        with self._changed:
            return sorted({call.guard.__name__ for call in self._running})

    def faults_by_function(self) -> list[float]:
        """How many calls of each function are in `faults`."""
        names = [func.__name__ for func in self.funcs]
        counts = [0.0] * len(names)
        for fault in self.faults:
            counts[names.index(fault.name)] += 1
        return counts

    def discard(self) -> None:
        """
        Drop everything that was submitted, so that the next batch starts clean. Threads that are still running are not
        waited for, and their results are dropped.
        """
        with self._changed:
            self._waiting.clear()
            for call in list(self._running):
                self._settle(call)
            self._calls = [[] for _ in self.funcs]

    def close(self) -> None:
        """[`discard`] at the end of training. Threads that are still running don't keep the interpreter alive."""
        self.discard()

    # Calls

    def _start_calls(self) -> None:
        while self._waiting and len(self._running) < self.in_flight:
            call = self._waiting.popleft()
            self._running.add(call)
            if self.timeout is not None:
                call.timer = threading.Timer(self.timeout, self._time_out, [call])
                call.timer.daemon = True
                call.timer.start()
            if isinstance(call.guard, AsyncRewardGuard):
                assert self.loop is not None
                call.future = asyncio.run_coroutine_threadsafe(self._run_async(call), self.loop)
            else:
                # Not a thread of a pool, for which the interpreter would wait at its exit even if a call hangs
                threading.Thread(target=self._run, args=[call], name=call.guard.__name__, daemon=True).start()

    def _run(self, call: _Call) -> None:
        try:
            if self._device is not None:
                torch.accelerator.set_device_index(self._device)  # the current device is a thread's own
            rewards = call.rewards_of(call.guard(**call.columns))
            self._settle(call, rewards, call.guard.fault)
        except BaseException as stop:  # such as KeyboardInterrupt; the guard catches every Exception
            self._settle(call, stop=stop)

    async def _run_async(self, call: _Call) -> None:
        if call.settled:
            return
        try:
            rewards = call.rewards_of(await call.guard(**call.columns))
            self._settle(call, rewards, call.guard.fault)
        except asyncio.CancelledError:  # by `_settle`, which has settled the call, or by the function itself
            self._settle(call, fault=call.guard.fault or call.fault_of("was cancelled"))
        except BaseException as stop:  # caught, because it would end the loop
            self._settle(call, stop=stop)

    def _time_out(self, call: _Call) -> None:
        fault = call.guard.fault or call.fault_of(f"took longer than {self.timeout:g} seconds")
        call.timed_out = call.guard.fault is None
        self._settle(call, fault=fault)

    def _settle(
        self,
        call: _Call,
        rewards: list[float | None] | None = None,
        fault: str | None = None,
        stop: BaseException | None = None,
    ) -> None:
        with self._changed:
            if call.settled:
                return
            call.settled, call.fault, call.stop = True, fault, stop
            if rewards is not None:
                call.rewards = rewards
            elif call.future is not None:
                call.future.cancel()
            if call.timer is not None:
                call.timer.cancel()
            self._running.remove(call)
            self._start_calls()
            self._changed.notify_all()

    # Results

    def _log(self, calls: list[_Call]) -> None:
        healthy = [call for call in calls if call.fault is None]
        for column in dict.fromkeys(column for call in healthy for column in list(call.extras)):
            self._loggers["log_extra"](column, [value for call in calls for value in call.extra(column)])
        for call in healthy:
            for name, value in call.metrics:
                self._loggers["log_metric"](name, value)

    def _rewards(self, index: int, calls: list[_Call]) -> list[float | None]:
        func = self.funcs[index]
        rewards: list[float | None] = []
        for call in calls:
            self._failures[index] = 0 if call.fault is None else self._failures[index] + 1
            rows = range(len(rewards), len(rewards) + call.size)
            if call.fault is not None:
                self.faults.append(RewardFault(func.__name__, rows, call.fault))
            rewards += call.rewards
        failed = [call for call in calls if call.fault is not None and not (call.timed_out or self.tolerates_errors)]
        if calls and self._failures[index] >= max(len(calls), BROKEN_AFTER):
            failed = calls
        if failed:
            func.fault = failed[0].fault
            return [FAILED] * len(rewards)
        return rewards
