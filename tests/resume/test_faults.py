"""
`make test-faults`: every cell of the table, in processes that are killed. One is killed by SIGKILL at a random moment:
in a pass of the model, before or after an optimizer step, while a file of a checkpoint is half written, flushed or
moved. What goes on from there gets SIGTERM at a random moment, and goes on again. `FAULTS_SEED` chooses the moments.
"""

import json
import os
import random
import signal
from pathlib import Path

import processes
import pytest
import torch
from comparing import equal
from resume.cases import FEATURES, RUNS, TRAINERS

from trl_ext.trainers.seams.preemption import PREEMPTED


pytestmark = pytest.mark.faults
WORKER = Path(__file__).with_name("worker.py")
SEED = os.environ.get("FAULTS_SEED", "0")


@pytest.mark.parametrize(("trainer", "name"), RUNS, ids=map(", ".join, RUNS))
def test_killed_and_resumed(trainer, name, tmp_path):
    def status(output, *when):
        process = processes.start([WORKER, trainer, name, tmp_path, tmp_path / output, *when])
        return process.wait(), process

    ended, process = status("whole")
    assert ended == 0, process.printed()
    counts = json.loads((tmp_path / "whole.json").read_text())
    draw = random.Random(f"{trainer} {name} {SEED}")
    kind = draw.choice(sorted(counts))
    kill = kind, draw.randint(1, counts[kind]), "SIGKILL"
    ended, process = status("cut", *kill)
    assert ended == -signal.SIGKILL, f"{kill}\n{process.printed()}"
    preempt = "forward", draw.randint(1, max(1, counts["forward"] // 2)), "SIGTERM"
    ended, process = status("cut", *preempt)
    # Between the stages of the pipeline nothing handles it; the run may be over before that moment
    assert ended in (0, PREEMPTED, -signal.SIGTERM), f"{kill} {preempt}\n{process.printed()}"
    if ended:
        ended, process = status("cut")
        assert ended == 0, f"{kill} {preempt}\n{process.printed()}"
    found, expected = (torch.load(tmp_path / f"{run}.pt", weights_only=False) for run in ("cut", "whole"))
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        assert equal(found[what], value), f"{what} differs after {kill} {preempt}"


def test_every_trainer_and_every_feature_has_a_run():
    assert {trainer for trainer, _ in RUNS} == set(TRAINERS)
    assert {name for _, name in RUNS} == set(FEATURES)
