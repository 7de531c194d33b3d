"""
Sides of a benchmark that are alive at the same time, each in a process of its own, and take turns after every step, so
that whatever slows the machine down falls on all of them; and what such a process measures of itself.

Nothing heavy is imported here: what a side imports is its own, and is measured.
"""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any


def quiet_environment() -> dict[str, str]:
    """This process's environment variables, with one thread and no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


# What happens in the process of a side


def wait_for_turn() -> None:
    """Says that this process waits, and waits for a line."""
    print("waiting", file=sys.__stdout__, flush=True)
    sys.stdin.readline()


def resident(field: str) -> float:
    """A field of this process's status, in MB: `VmRSS`, or `VmHWM` for its peak."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


class Memory:
    """Resident memory from now on. What was freed until now is given back first, or it would be used for nothing."""

    def __init__(self) -> None:
        gc.collect()
        with suppress(OSError, AttributeError):  # where there is glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = resident("VmRSS")
        with suppress(OSError):  # where the kernel doesn't allow it, a peak among the imports would be counted
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts over

    @property
    def peak(self) -> float:
        try:
            return resident("VmHWM") - self.before
        except StopIteration:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - self.before


class Clock:
    """
    Seconds of each step after the first, and of generation and training in it.

    Args:
        wait (`Callable`):
            Called between two steps; what it takes doesn't count.
    """

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait
        self.steps: list[dict[str, float]] = []
        self.began: tuple[float, float] | None = None  # wall-clock, CPU
        self.generation = 0.0
        self.began_training: float | None = None

    def around_generation(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = generate(*args, **kwargs)
            self.generation = time.perf_counter() - began
            return result

        return timed

    def follow(self, trainer: Any) -> None:
        """Notice when a trainer of `trl_ext` generates, and when it begins to train on a batch."""
        trainer._generate_single_turn = self.around_generation(trainer._generate_single_turn)
        score = trainer._generate_and_score_completions

        def scored(*args: Any, **kwargs: Any) -> Any:
            result = score(*args, **kwargs)
            self.begin_training()
            return result

        trainer._generate_and_score_completions = scored

    def begin_training(self, *_: Any) -> None:
        """May be called more than once a step."""
        if self.began_training is None:
            self.began_training = time.perf_counter()

    def end_step(self) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        assert self.generation and self.began_training
        parts = {"generation": self.generation, "training": now - self.began_training}
        if self.began is not None:
            self.steps.append({"seconds": now - self.began[0], "cpu_seconds": cpu - self.began[1], **parts})
        self.generation, self.began_training = 0.0, None
        self.wait()
        self.began = time.perf_counter(), time.process_time()


# What happens in the main process


class Run:
    """
    A side in a process of its own, which waits between steps.

    Args:
        side (`str`):
            Its name.
        command (`list[str]`):
            Starts it. It calls [`wait_for_turn`] before each step, and prints what it measured as JSON at its end.
        environment (`dict[str, str]`):
            Its environment variables.
        errors (`IO[str]`):
            A file for what else it prints.
    """

    def __init__(self, side: str, command: list[str], environment: dict[str, str], errors: IO[str]) -> None:
        self.side, self.errors = side, errors
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.read()

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.side} failed:\n{self.errors.read()}")
        return line

    def step(self) -> None:
        """Have it do one step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.read()

    def found(self) -> dict[str, Any]:
        """What it measured, once all steps are done."""
        self.process.stdin.close()
        found: dict[str, Any] = json.loads(self.read())
        self.process.wait()
        return found


def take_turns(
    commands: Mapping[str, list[str]], environments: Mapping[str, dict[str, str]], steps: int
) -> dict[str, dict[str, Any]]:
    """One run of each side, in turn after every step: what each measured, by side."""
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        for side, command in commands.items():
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            runs[side] = Run(side, command, environments[side], errors)
            stack.callback(runs[side].process.kill)
        for step in range(steps):
            for side in runs if step % 2 == 0 else reversed(runs):
                runs[side].step()
        return {side: run.found() for side, run in runs.items()}
