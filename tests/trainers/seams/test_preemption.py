"""SIGTERM in the middle of a run, sent to real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trl_ext.trainers.seams.preemption import PREEMPTED
from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of, damage


WORKER = Path(__file__).with_name("preemption_worker.py")


def started(output: Path, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, str(WORKER), str(output), *arguments]
    path = os.pathsep.join(map(str, (WORKER.parents[3], WORKER.parents[2])))
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def after_batches(folder: Path, count: int, process: subprocess.Popen[str], rank: int = 0) -> int:
    """Waits until a process has made so many generation batches. Returns its id."""
    batches = folder / f"batches_{rank}"
    end = time.monotonic() + 120
    while not batches.exists() or batches.stat().st_size < count:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
    return int((folder / f"pid_{rank}").read_text())


def whole_run(folder: Path) -> dict[str, torch.Tensor]:
    process = started(folder / "out")
    assert process.wait(timeout=180) == 0, process.communicate()[0]
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return weights


@pytest.mark.slow
def test_a_run_that_is_preempted_ends_with_a_checkpoint_and_resumes_to_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    process = started(tmp_path / "cut" / "out")
    os.kill(after_batches(tmp_path / "cut", 3, process), signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED, text
    assert "AFTER TRAINING" not in text and "Resume with resume_from_checkpoint=True" in text
    assert "Traceback" not in text
    (checkpoint,) = checkpoints_of(tmp_path / "cut" / "out")
    assert damage(checkpoint) is None and 1 <= int(checkpoint.name.split("-")[1]) < 30
    resumed = started(tmp_path / "cut" / "out", "resume")
    assert resumed.wait(timeout=180) == 0, resumed.communicate()[0]
    again = torch.load(tmp_path / "cut" / "weights.pt", weights_only=True)
    for name, value in whole_run(tmp_path / "whole").items():
        assert torch.equal(again[name], value), name


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path):
    process = started(tmp_path / "out")
    pid = after_batches(tmp_path, 2, process)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert not checkpoints_of(tmp_path / "out")


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_stop_after_the_same_step(tmp_path, rank):
    """One of two processes gets the signal."""
    process = started(tmp_path / "out", processes=2)
    os.kill(after_batches(tmp_path, 3, process, rank), signal.SIGTERM)
    text, _ = process.communicate(timeout=150)
    assert process.returncode != 0 and "AFTER TRAINING" not in text, text
    assert f"exitcode  : {PREEMPTED} " in text or f"exitcode: {PREEMPTED}" in text, text
    (checkpoint,) = checkpoints_of(tmp_path / "out")
    assert damage(checkpoint) is None
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
