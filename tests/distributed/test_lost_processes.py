"""A process that dies ends the others within a minute, with a message: real processes, a real SIGKILL, no launcher."""

import os
import signal
import time
from pathlib import Path

import pytest
from processes import start_ranks

from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of, damage


pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("lost_worker.py")


@pytest.mark.parametrize(("case", "processes"), [("collective", 2), ("elsewhere", 3), ("stops", 2)])
def test_the_others_end_within_a_minute_and_say_why(tmp_path, case, processes):
    *others, last = start_ranks([WORKER, tmp_path / "out", case], processes)
    pids = [tmp_path / f"pid_{rank}" for rank in range(processes)]
    end = time.monotonic() + 240
    while not all(pid.exists() for pid in pids):
        assert time.monotonic() < end and all(other.poll() is None for other in others), others[0].printed()
        time.sleep(0.05)
    if case != "stops":
        os.kill(int(pids[-1].read_text()), signal.SIGKILL)
    told = time.monotonic()
    for process in others:
        assert process.wait(timeout=60) not in (0, None)
        text = process.printed()
        assert f"Process {processes - 1} of {processes}" in text
        assert "start again with resume_from_checkpoint=True" in text
        assert ("is gone without a word" if case != "stops" else "has stopped (KeyboardInterrupt") in text
        if case == "elsewhere":
            assert "still waits, and ends now" in text
    assert time.monotonic() - told < 60
    last.kill(signal.SIGKILL)
    (checkpoint,) = checkpoints_of(tmp_path / "out")
    assert checkpoint.name == "checkpoint-1" and damage(checkpoint) is None


def test_a_process_that_dies_at_once_is_noticed(tmp_path):
    """Its connection is there before training begins, however little time that leaves."""
    first, last = start_ranks([WORKER, tmp_path / "out", "at once"], 2)
    assert last.wait(timeout=240) == -signal.SIGKILL
    assert first.wait(timeout=60) not in (0, None)
    assert "Process 1 of 2 is gone without a word" in first.printed()
