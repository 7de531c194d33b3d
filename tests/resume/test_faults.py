"""
Runs in processes that are killed. `make test-faults` has every cell of the table: one process is killed by SIGKILL at
a random moment (in a pass of the model, before or after an optimizer step, while a file of a checkpoint is half
written, flushed or moved). What goes on from there gets SIGTERM at a random moment, and goes on again. And every
trainer with two processes, one of which is killed. `FAULTS_SEED` chooses the moments. `make test` has two of these.
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from comparing import equal
from resume.cases import FEATURES, PIPELINE, RUNS, TRAINERS, policy

from trl_ext.trainers.seams.preemption import PREEMPTED


WORKER = Path(__file__).with_name("worker.py")
SEED = os.environ.get("FAULTS_SEED", "0")
SHORT = ("PPO model", "all at once")
SHORT_OF_TWO = ("DAPO", "informed draws")
OF_TWO = [
    ("GRPO", "all at once"),
    ("RLOO", "curriculum"),
    ("DUPO", "half-used batches"),
    ("GSPO", "objectives"),
    ("PPO head", "all at once"),
    ("PPO model", "adaptive KL"),
    ("VAPO", "all at once"),
    ("DPO", "sync_ref_model"),
]


def random_moment(draw: random.Random, counts: dict[str, int]) -> tuple[str, int]:
    kind = draw.choice(sorted(counts))
    return kind, draw.randint(1, counts[kind])


def assert_equal_ends(folder: Path, rank: int, after: Any) -> None:
    found, expected = (torch.load(folder / f"{run}.{rank}.pt", weights_only=False) for run in ("cut", "whole"))
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        assert equal(found[what], value), f"{what} of process {rank} differs after {after}"


def killed_and_resumed(trainer: str, name: str, folder: Path) -> None:
    def status(output: str, *when: Any) -> tuple[int, processes.Process]:
        process = processes.start([WORKER, trainer, name, folder, folder / output, *when])
        return process.wait(), process

    ended, process = status("whole")
    assert ended == 0, process.printed()
    counts = json.loads((folder / "whole.0.json").read_text())
    draw = random.Random(f"{trainer} {name} {SEED}")
    kill = *random_moment(draw, counts), "SIGKILL"
    ended, process = status("cut", *kill)
    assert ended == -signal.SIGKILL, f"{kill}\n{process.printed()}"
    preempt = "forward", draw.randint(1, max(1, counts["forward"] // 2)), "SIGTERM"
    ended, process = status("cut", *preempt)
    # Between the stages of the pipeline nothing handles it; the run may be over before that moment
    assert ended in (0, PREEMPTED, -signal.SIGTERM), f"{kill} {preempt}\n{process.printed()}"
    if ended:
        ended, process = status("cut")
        assert ended == 0, f"{kill} {preempt}\n{process.printed()}"
    assert_equal_ends(folder, 0, (kill, preempt))


def one_of_two_killed_and_resumed(trainer: str, name: str, folder: Path) -> None:
    def ended(output: str, *when: Any) -> list[processes.Process]:
        ranks = processes.start_ranks([WORKER, trainer, name, folder, folder / output, *when], 2)
        if when:  # that rank first: the other has a minute from there
            ranks[int(when[-1])].wait()
            killed = time.monotonic()
        for rank in ranks:
            rank.wait()
        if when:
            assert time.monotonic() - killed < 60
        return ranks

    policy(folder, quantized=False)  # or both would save it at once
    for rank in ended("whole"):
        assert rank.returncode == 0, rank.printed()
    draw = random.Random(f"{trainer} {name} {SEED}")
    victim = draw.randrange(2)
    kill = *random_moment(draw, json.loads((folder / f"whole.{victim}.json").read_text())), "SIGKILL", victim
    ranks = ended("cut", *kill)
    other = ranks[1 - victim]
    assert ranks[victim].returncode == -signal.SIGKILL, f"{kill}\n{ranks[victim].printed()}"
    assert other.returncode != 0 and f"Process {victim} of 2 is gone" in other.printed(), f"{kill}\n{other.printed()}"
    for rank in ended("cut"):
        assert rank.returncode == 0, f"{kill}\n{rank.printed()}"
    for index in range(2):
        assert_equal_ends(folder, index, kill)


@pytest.mark.train
@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed(tmp_path):
    killed_and_resumed(*SHORT, tmp_path)


@pytest.mark.distributed
def test_a_run_of_two_processes_one_of_which_is_killed(tmp_path):
    one_of_two_killed_and_resumed(*SHORT_OF_TWO, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(("trainer", "name"), RUNS, ids=map(", ".join, RUNS))
def test_killed_and_resumed(trainer, name, tmp_path):
    killed_and_resumed(trainer, name, tmp_path)


@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.parametrize(("trainer", "name"), OF_TWO, ids=map(", ".join, OF_TWO))
def test_one_of_two_killed_and_resumed(trainer, name, tmp_path):
    one_of_two_killed_and_resumed(trainer, name, tmp_path)


def test_every_trainer_and_every_feature_has_a_run():
    assert {trainer for trainer, _ in RUNS} == set(TRAINERS)
    assert {name for _, name in RUNS} == set(FEATURES)
    assert {trainer for trainer, _ in [*OF_TWO, SHORT_OF_TWO]} == set(TRAINERS) - {PIPELINE}
