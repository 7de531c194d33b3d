"""
Random small runs of DAPO and DUPO with random rewards, on two processes and on three: none hangs, all processes train
on equally many rows and end with the same weights. `RANDOM_RUNS_SEED` chooses other runs.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.random_worker import METHODS
from processes import run


pytestmark = [pytest.mark.train, pytest.mark.distributed]

WORKER = Path(__file__).with_name("random_worker.py")
SEED = os.environ.get("RANDOM_RUNS_SEED", "0")


def found_of(folder: Path, processes: int, count: int) -> list[list[dict[str, Any]]]:
    """What each process found of each run, by run."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run([*launch, WORKER, folder, SEED, count], timeout=1200)
    ranks = [torch.load(folder / f"found_{processes}_{i}.pt", weights_only=False) for i in range(processes)]
    return list(map(list, zip(*ranks, strict=True)))


def check(runs: list[list[dict[str, Any]]]) -> None:
    for number, of_ranks in enumerate(runs):
        first = of_ranks[0]
        for found in of_ranks:
            for what in ("dealt", "computed", "steps", "weights", "error", "counters"):
                assert found[what] == first[what], (number, what)
        rows = {first["settings"]["per_device_train_batch_size"]}
        assert {size for buffer in first["dealt"] for size in buffer} <= rows
        assert first["steps"] == first["settings"]["max_steps"] or "nan" in first["error"]


@pytest.mark.parametrize("processes", [2, 3])
def test_a_few(processes: int, tmp_path: Path) -> None:
    runs = found_of(tmp_path, processes, 4)
    assert len(runs) == 4
    check(runs)
    for rank in range(processes):
        message = torch.load(tmp_path / f"refused_{processes}_{rank}.pt")
        assert f"({processes}) must be divisible by num_generations (4)" in message
        assert "choose per_device_train_batch_size × processes" in message


@pytest.mark.engines
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("processes", [2, 3])
def test_fifty(processes: int, tmp_path: Path) -> None:
    runs = found_of(tmp_path, processes, 50)
    assert len(runs) == 50
    check(runs)
    firsts = [of_ranks[0] for of_ranks in runs]
    assert {found["method"] for found in firsts} == set(METHODS)
    # Among them are runs that learned, runs that had nothing to learn from, and runs that nan ended
    for found in ([first["moved"] for first in firsts], [first["error"] is not None for first in firsts]):
        assert 0 < sum(found) < len(found)
    group_on_two = [f["settings"]["per_device_train_batch_size"] % f["settings"]["num_generations"] for f in firsts]
    assert any(group_on_two) and not all(group_on_two)
