"""Four roles on one base in 4 bits: each process holds the base weights once, before a training step and in it."""

from pathlib import Path

import pytest
import torch
from distributed.trunk_worker import ROLES, prepare
from processes import run


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_holds_one_copy_of_the_base(processes, tmp_path):
    prepare(tmp_path)
    worker = [Path(__file__).with_name("trunk_worker.py"), tmp_path, tmp_path / "run"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    run([*launcher, *worker])
    for rank in range(processes):
        found = torch.load(tmp_path / f"run.{rank}.pt", weights_only=False)
        assert found["processes"] == processes
        assert {name: told["adapter"] for name, told in found["roles"].items()} == ROLES
        assert all(told["shares_base"] for told in found["roles"].values())
        assert found["expected"][0] == 14  # seven matrices in each of two layers
        assert found["before"] == found["expected"]
        assert len(found["during"]) == 3 and {*found["during"]} == {found["expected"]}
        assert {name.split(".")[-2] for name in found["moved"] if "lora" in name} == {"default", "critic"}
