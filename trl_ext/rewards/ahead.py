"""
Rewards of finished completions, computed while the next ones are generated. Results and logs are handed out in the
order of submission, whichever call comes back first.
"""

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import chain
from typing import Any, NamedTuple

import torch

from .guard import FAILED, AsyncRewardGuard, RewardGuard, cut_columns, describe_fault
from .steps import is_by_step


# A function that failed on this many groups in a row, all groups of the last batch among them, is broken. Fewer may be
# an unlucky batch: a refill round can be one group.
BROKEN_AFTER = 4


class RewardFault(NamedTuple):
    """
    A call of a reward function that failed.

    Args:
        name (`str`):
            The function.
        rows (`range`):
            The completions that have no reward from it, counted over the batch in order of submission.
        message (`str`):
            What happened, and on which sample.
    """

    name: str
    rows: range
    message: str


class _Call:
    """One function on one group, with what it logs."""

    def __init__(self, func: RewardGuard, columns: dict[str, Any]) -> None:
        self.guard = type(func)(func.func, func.__name__)  # its `fault` is this call's alone
        self.size = len(columns["prompts"])
        self.extras: defaultdict[str, list[Any]] = defaultdict(list)
        self.metrics: list[tuple[str, float]] = []
        recorders = {
            "log_extra": lambda column, values: self.extras[column].extend(values),
            "log_metric": lambda name, value: self.metrics.append((name, value)),
        }
        self.columns = {key: recorders.get(key, value) for key, value in columns.items()}
        self.settled = False  # what still comes after that is dropped
        self.rewards: list[float | None] = [None] * self.size
        self.fault: str | None = None
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
        """One value for each completion."""
        values = [] if self.fault else self.extras.get(column, [])
        return [*values, *[None] * self.size][: self.size]


class RewardsAhead:
    """
    Calls reward functions on finished groups in the background. Sync functions run in threads, so several calls of
    one may run at the same time; async ones run on an event loop. Nothing is started before the first [`submit`].

    A call that fails or takes too long costs its group that reward (`None`: does not apply), for all of its
    completions alike, and is told in `faults`. A function that failed on all groups, and at least `BROKEN_AFTER` times
    in a row, is broken: its rewards are [`FAILED`], with `fault` set on its guard.

    Args:
        funcs (`list[RewardGuard]`):
            The functions in the trainer's order, without reward models.
        in_flight (`int`):
            How many calls run at the same time, over all functions; the others wait in order of submission.
        timeout (`float`, *optional*):
            Seconds that one call may run. An async call is cancelled then. A sync one can't be: its thread is left
            behind, and doesn't count as in flight any more.
        loop (`asyncio.AbstractEventLoop`, *optional*):
            Where async functions run: TRL's `async_loop`, which runs in another thread.

    Attributes:
        faults (`list[RewardFault]`):
            Those of the last [`collect`].
    """

    def __init__(
        self,
        funcs: list[RewardGuard],
        in_flight: int,
        timeout: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"`in_flight` must be at least 1, not {in_flight}")
        if loop is None and any(isinstance(func, AsyncRewardGuard) for func in funcs):
            raise ValueError("Async reward functions need the event loop they run on: pass `loop`")
        self.funcs = funcs
        self.in_flight = in_flight
        self.timeout = timeout
        self.loop = loop
        self.faults: list[RewardFault] = []
        self._failures = dict.fromkeys(range(len(funcs)), 0)  # in a row, by function
        self._calls: list[list[_Call]] = [[] for _ in funcs]
        self._waiting: deque[_Call] = deque()
        self._running: set[_Call] = set()
        self._changed = threading.Condition()  # guards all of these
        self._loggers: dict[str, Callable[..., Any]] = {}
        self._device: int | None = None

    def submit(self, columns: dict[str, Any], group_size: int) -> None:
        """
        Queue finished completions and return at once.

        Args:
            columns (`dict[str, Any]`):
                The arguments as TRL passes them to a reward function. Lists of one value for each completion (as many
                as `prompts`) are cut by group; everything else is passed on as it is.
            group_size (`int`):
                Completions in a group; the last group may have fewer.
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
        Wait for everything that was submitted since the last time, and pass on to TRL what it logged.

        Returns:
            `list[list[float | None]]`: for each function, the rewards of all completions in order of submission. What
            a guard's `ready` takes.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._running)
            by_func, self._calls = self._calls, [[] for _ in self.funcs]
        for call in chain.from_iterable(by_func):
            if call.stop is not None:
                raise call.stop
        # TRL calls async functions after all others
        for index in sorted(range(len(self.funcs)), key=lambda i: isinstance(self.funcs[i], AsyncRewardGuard)):
            self._log(by_func[index])
        self.faults = []
        return [self._rewards(index, calls) for index, calls in enumerate(by_func)]

    def faults_by_function(self) -> list[float]:
        """How many calls of each function are in `faults`."""
        names = [func.__name__ for func in self.funcs]
        counts = [0.0] * len(names)
        for fault in self.faults:
            counts[names.index(fault.name)] += 1
        return counts

    def discard(self) -> None:
        """Drop everything that was submitted; the next batch starts clean. Threads that still run are left behind."""
        with self._changed:
            self._waiting.clear()
            for call in list(self._running):
                self._settle(call)
            self._calls = [[] for _ in self.funcs]

    def close(self) -> None:
        """The end of training: [`discard`]. Threads that still run don't keep the interpreter from exiting."""
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
                # Not a pool's thread: the interpreter waits for those before it exits, hanging calls included
                threading.Thread(target=self._run, args=[call], name=call.guard.__name__, daemon=True).start()

    def _run(self, call: _Call) -> None:
        try:
            if self._device is not None:
                torch.accelerator.set_device_index(self._device)  # each thread has its own
            rewards = call.rewards_of(call.guard(**call.columns))
            self._settle(call, rewards, call.guard.fault)
        except BaseException as stop:  # the guard lets no others through
            self._settle(call, stop=stop)

    async def _run_async(self, call: _Call) -> None:
        if call.settled:
            return
        try:
            rewards = call.rewards_of(await call.guard(**call.columns))
            self._settle(call, rewards, call.guard.fault)
        except asyncio.CancelledError:  # by us, and settled already; else from within the function
            self._settle(call, fault=call.guard.fault or call.fault_of("was cancelled"))
        except BaseException as stop:  # would end the loop
            self._settle(call, stop=stop)

    def _time_out(self, call: _Call) -> None:
        fault = call.guard.fault or call.fault_of(f"took longer than {self.timeout:g} seconds")
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

    # What comes back

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
        if calls and self._failures[index] >= max(len(calls), BROKEN_AFTER):
            func.fault = calls[0].fault
            return [FAILED] * len(rewards)
        return rewards
