"""
Processes of their own for tests. `run(["worker.py", "argument"])` does what `python worker.py argument` does. It also
takes the two launchers: `["-m", "torch.distributed.run", "--nproc_per_node", "2", "worker.py"]` and
`["-m", "accelerate.commands.launch", "--config_file", "zero3.yaml", "worker.py"]`.

An interpreter needs seven seconds to import torch, TRL and DeepSpeed. Each process here is a fork of one that has
imported them and has done nothing else: it has no Accelerate state, no process group and no second Python thread. The
launchers parse their arguments and files as always; only the ranks that they start are forks as well. What is read
when Python starts (`PYTHONHASHSEED`) or when a library is imported (`HF_ENDPOINT`) needs an interpreter of its own.
"""

import atexit
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Whether the test that runs is marked `distributed` (`conftest.py`)
launchers_allowed = True


# What tests call


@dataclass
class Process:
    """A process that was started, and the file that takes what it prints."""

    pid: int
    output: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; `None` while it runs."""
        if self.returncode is None:
            self.returncode = _parent().ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300.0) -> int:
        """Waits for the end. After `timeout` seconds the process and its children are killed, which is an error."""
        stop = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > stop:
                self.kill(signal.SIGKILL)
                raise AssertionError(f"no end after {timeout:.0f} s\n{self.printed()}")
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self, number: int) -> None:
        """Sends a signal to the process and its children."""
        for _ in range(500):
            try:
                os.killpg(self.pid, number)
                return
            except ProcessLookupError:  # it has ended, or has yet to begin its session
                if self.poll() is not None:
                    return
                time.sleep(0.01)

    def printed(self, most: int = 8000) -> str:
        return self.output.read_text(errors="replace")[-most:]


def start(command: Sequence[Any], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Process:
    """
    Starts a process, in a session of its own.

    Args:
        command (`list`):
            The command line after `python`: a script, `-m MODULE` (which has a `main()`) or `-c CODE`, and its
            arguments.
        env (`dict`, *optional*):
            Variables beside those of this process.
        cwd (`Path`, *optional*):
            Where it runs; here by default.
    """
    if command[0] == "-m" and not launchers_allowed:
        raise AssertionError("this starts several processes: mark the test with @pytest.mark.distributed")
    handle, output = tempfile.mkstemp(prefix="output_", suffix=".txt", dir=_parent().directory.name)
    os.close(handle)
    request = {
        "command": [str(part) for part in command],
        "env": {**os.environ, **(env or {})},
        "cwd": str(cwd or Path.cwd()),
        "output": output,
    }
    return Process(_parent().ask(request), Path(output))


def start_ranks(command: Sequence[Any], count: int, env: Mapping[str, str] | None = None) -> list[Process]:
    """
    Starts `count` processes that train together, without a launcher, which would end the others when one of them ends.
    """
    if not launchers_allowed:
        raise AssertionError("this starts several processes: mark the test with @pytest.mark.distributed")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), **(env or {})}
    return [start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run(
    command: Sequence[Any], env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300.0
) -> str:
    """Runs a process to its end ([`start`]) and returns what it printed. An exit status other than 0 is an error."""
    process = start(command, env, cwd)
    status = process.wait(timeout)
    assert status == 0, f"exit status {status}\n{process.printed()}"
    return process.output.read_text(errors="replace")


class _Parent:
    """The process from which all are forked, started on first use; it ends with this one, which closes its input."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="processes_")
        env = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": f"{self.directory.name}/datasets",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process to fork from ended with status {self.process.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()
        self.directory.cleanup()


@functools.cache
def _parent() -> _Parent:
    return _Parent()


# What runs in the process that is forked


def serve() -> None:
    """Imports, then answers requests: a command is forked and answered with its id, a poll with its exit status."""
    # Only answers go to the parent's pipe
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        answer = polled(request["poll"]) if "poll" in request else fork(lambda given=request: become(**given))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def prepare() -> None:
    import accelerate.commands.launch
    import deepspeed
    import tiny  # noqa: F401 -- and all that it imports
    import torch.distributed.run
    import trl.experimental  # noqa: F401

    torch.distributed.run.run = run_ranks
    # Compiled for 40 seconds on a machine's first run; it reduces between processes in inference, never in training
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    assert accelerate.PartialState._shared_state == {}
    assert threading.active_count() == 1
    # Accelerate collects garbage around every training, and would look through all that was imported each time
    gc.collect()
    gc.freeze()


def polled(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def fork(body: Callable[[], None]) -> int:
    """Forks a process that does `body` and ends."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def become(command: list[str], env: dict[str, str], cwd: str, output: str) -> None:
    """Makes this process what a new interpreter with `command` would be."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if command[0] == "-m":
        # One launch at a time, whoever runs tests: its ranks take the cores. Held until the last of them ends
        lock = os.open(
            Path(tempfile.gettempdir()) / f"trl_ext_tests_{os.getuid()}.lock", os.O_RDWR | os.O_CREAT, 0o600
        )
        fcntl.flock(lock, fcntl.LOCK_EX)
    execute(command)


def execute(command: list[str]) -> None:
    if command[0] == "-u":
        command = command[1:]
    if command[0] == "-m":
        sys.argv = command[1:]
        importlib.import_module(command[1]).main()
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<command>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")


def run_ranks(args: Any) -> None:
    """In place of `torch.distributed.run.run`: as many forks as there are ranks on this machine, each told its own."""
    assert args.nnodes in ("1", "1:1"), "one machine"
    world = int(args.nproc_per_node)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }

    def rank_of(rank: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        execute([args.training_script, *args.training_script_args])

    running = {fork(functools.partial(rank_of, rank)): rank for rank in range(world)}

    def end(status: int) -> None:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        sys.exit(status)

    signal.signal(signal.SIGTERM, lambda number, frame: end(128 + number))
    while running:
        pid, status = os.wait()
        rank = running.pop(pid)
        if status:
            print(f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            end(1)


if __name__ == "__main__":
    serve()
