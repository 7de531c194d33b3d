"""A process that dies ends the others within a minute, with a message: real processes, a real SIGKILL, no launcher."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from processes import Process, start

from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of, damage


pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("lost_worker.py")


def started(folder: Path, case: str, processes: int) -> list[Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [
        start([WORKER, folder / "out", case], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


@pytest.mark.parametrize(("case", "processes"), [("collective", 2), ("elsewhere", 3), ("stops", 2)])
def test_the_others_end_within_a_minute_and_say_why(tmp_path, case, processes):
    *others, last = started(tmp_path, case, processes)
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
