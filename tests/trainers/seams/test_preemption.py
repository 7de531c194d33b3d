"""SIGTERM in the middle of a run, sent to processes of their own."""

import ctypes
import io
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch

from trl_ext.trainers.seams.preemption import PREEMPTED, preemption_of
from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of, damage


WORKER = Path(__file__).with_name("preemption_worker.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def after_batches(folder: Path, count: int, process: processes.Process, rank: int = 0) -> int:
    """Waits until a process has made so many generation batches. Returns its id."""
    batches = folder / f"batches_{rank}"
    end = time.monotonic() + 120
    while not batches.exists() or batches.stat().st_size < count:
        assert process.poll() is None and time.monotonic() < end, process.printed()
        time.sleep(0.02)
    return int((folder / f"pid_{rank}").read_text())


def weights_of(folder: Path, *arguments: Any) -> dict[str, torch.Tensor]:
    """Of a run to its end."""
    processes.run([WORKER, folder / "out", *arguments])
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return weights


def test_a_run_that_is_preempted_ends_with_a_checkpoint_and_resumes_to_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    process = processes.start([WORKER, tmp_path / "cut" / "out"])
    os.kill(after_batches(tmp_path / "cut", 3, process), signal.SIGTERM)
    assert process.wait(timeout=120) == PREEMPTED, process.printed()
    text = process.printed()
    assert "AFTER TRAINING" not in text and "Resume with resume_from_checkpoint=True" in text
    assert "Traceback" not in text
    (checkpoint,) = checkpoints_of(tmp_path / "cut" / "out")
    assert damage(checkpoint) is None and 1 <= int(checkpoint.name.split("-")[1]) < 30
    again = weights_of(tmp_path / "cut", "resume")
    for name, value in weights_of(tmp_path / "whole").items():
        assert torch.equal(again[name], value), name


def test_a_second_signal_ends_it_at_once(tmp_path):
    process = processes.start([WORKER, tmp_path / "out", "long"])
    pid = after_batches(tmp_path, 1, process)
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 30
    while "A second one ends it now" not in process.printed():  # two that come before Python looks are one
        assert process.poll() is None and time.monotonic() < end, process.printed()
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert not checkpoints_of(tmp_path / "out")


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_stop_after_the_same_step(tmp_path, rank):
    """One of two processes gets the signal."""
    process = processes.start([*TWO, WORKER, tmp_path / "out"])
    os.kill(after_batches(tmp_path, 3, process, rank), signal.SIGTERM)
    assert process.wait(timeout=150) != 0
    text = process.printed()
    assert "AFTER TRAINING" not in text and f"ended with status {PREEMPTED}" in text
    (checkpoint,) = checkpoints_of(tmp_path / "out")
    assert damage(checkpoint) is None
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}


class SignalledWhileItWrites(io.RawIOBase):
    """A file during whose first write the process gets a SIGTERM."""

    signalled = False

    def writable(self) -> bool:
        return True

    def write(self, text: Any) -> int:
        if not self.signalled:
            self.signalled = True
            os.kill(os.getpid(), signal.SIGTERM)
        return len(text)


def test_the_signal_may_interrupt_a_print(monkeypatch, capfd):
    trainer = SimpleNamespace(add_callback=lambda callback: None, remove_callback=lambda callback: None)
    with monkeypatch.context() as patched, preemption_of(trainer) as preemption:
        patched.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(SignalledWhileItWrites())))
        print("step 3", flush=True)
    assert preemption.asked
    assert "training ends after this optimizer step" in capfd.readouterr().err


class TestTheHandlerThatWasThere:
    trainer = SimpleNamespace(add_callback=lambda callback: None, remove_callback=lambda callback: None)

    @staticmethod
    def in_c(handler: int) -> int:
        """Sets a handler behind Python's back, as a library does. Returns the address of the earlier one."""
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        return libc.signal(int(signal.SIGTERM), ctypes.c_void_p(handler)) or 0

    def test_in_python(self):
        before = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
        try:
            with preemption_of(self.trainer) as preemption:
                assert signal.getsignal(signal.SIGTERM) == preemption.handle
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_of_a_library(self):
        ignore = 1  # SIG_IGN
        before = self.in_c(ignore)
        try:
            with preemption_of(self.trainer) as preemption:
                os.kill(os.getpid(), signal.SIGTERM)
                assert preemption.asked
            assert self.in_c(ignore) == ignore
        finally:
            self.in_c(before)

    def test_from_before_python(self, monkeypatch):
        """Of such a handler Python says only that it isn't its own."""
        asked, real = [], signal.signal

        def of_python(number: int, handler: Any) -> Any:
            asked.append(handler)
            real(number, handler)

        monkeypatch.setattr(signal, "signal", of_python)
        before = signal.getsignal(signal.SIGTERM)
        with preemption_of(self.trainer) as preemption:
            pass
        assert asked == [preemption.handle, signal.SIG_DFL]
        real(signal.SIGTERM, before)
