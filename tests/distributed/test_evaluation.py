"""What two processes measure on a data set that they can't share evenly is what one measures in a single batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.evaluation_worker import GRPO_CASES
from processes import run


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("evaluation_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What every process of every launch measured, by (processes, rank)."""
    directory = tmp_path_factory.mktemp("evaluations")
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        run([*launch, WORKER, directory])
    return {key: torch.load(directory / "evaluated_{}_{}.pt".format(*key)) for key in ((1, 0), (2, 0), (2, 1))}


@pytest.mark.parametrize("case", [*GRPO_CASES, "dpo"])
def test_a_row_that_fills_up_a_batch_counts_once(results: Any, case: str) -> None:
    alone, first, second = (results[key][case] for key in ((1, 0), (2, 0), (2, 1)))
    assert first == second
    assert first == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert len(first) > 10
