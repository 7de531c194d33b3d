"""A run with replay goes on with another number of processes: each takes an equal share of the rows that were kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("resume_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the processes trained on: one first, then two that resume it, then one that resumes what two wrote."""
    directory = tmp_path_factory.mktemp("resumed")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = [run([*launch, WORKER, directory]) for launch in ([], two, [])]
    return {path.stem: torch.load(path) for path in directory.glob("*.pt")} | {"printed": printed}


def test_on_more_processes(found):
    kept = {row for step in found["first_1_0"]["first"]["rows"] for row in step}
    shares = [found[f"resumed_2_{rank}"]["resumed"] for rank in (0, 1)]
    for share in shares:
        assert share["ratios"][-2:] == [0.5, 0.5]  # from the first step on
        # Micro-batches of 4 new rows and 4 of those that one process had kept
        assert all(set(share["rows"][0][start + 4 : start + 8]) <= kept for start in (0, 8))
    replayed = [{row for start in (4, 12) for row in share["rows"][0][start : start + 4]} for share in shares]
    assert len(replayed[0]) == len(replayed[1]) == 8 and not replayed[0] & replayed[1]


def test_on_fewer_processes(found):
    kept = {row for rank in (0, 1) for step in found[f"resumed_2_{rank}"]["first"]["rows"] for row in step}
    again = found["resumed_1_0"]["resumed"]
    assert again["ratios"][-2:] == [0.5, 0.5]
    assert all(set(again["rows"][0][start + 4 : start + 8]) <= kept for start in (0, 8))


def test_what_is_not_exact_on_another_number_of_processes_is_said_in_one_line(found):
    first, *resumed = found["printed"]
    assert "generated anew" not in first
    for text in resumed:
        (line,) = {line for line in text.splitlines() if "The checkpoint was written with" in line}
        assert "is generated anew, and every process draws other random numbers; the rest of the run goes on" in line


def test_a_process_that_does_not_see_what_another_wrote_says_so(found):
    error = found["resumed_1_0"]["error"]
    assert "written by 2 processes, this run has 1, and process 0 doesn't find trl_ext_process_1.pt" in error
    assert "or resume on 2 processes" in error
