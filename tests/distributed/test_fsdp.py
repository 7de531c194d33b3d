"""Shared prompts with FSDP2, whose processes gather the layers of a model as a pass comes to them."""

from pathlib import Path

import pytest
import torch
from distributed.deepspeed_worker import read
from distributed.fsdp_worker import build
from processes import run


pytestmark = pytest.mark.distributed


def test_shared_prompts_take_the_same_steps(tmp_path, subtests):
    worker = Path(__file__).with_name("fsdp_worker.py")
    run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, tmp_path])
    for name, runs in torch.load(tmp_path / "found.pt", weights_only=False).items():
        with subtests.test(name):
            plain, shared = runs[False], runs["always"]
            assert torch.equal(shared["before"], plain["before"])
            movement = (plain["after"] - plain["before"]).norm()
            error = (shared["after"] - plain["after"]).norm() / movement
            assert movement > 0 and error <= 1e-5
            assert plain["sharing"] is None
            assert shared["sharing"].packed_passes > 0
            # What one process reads of prompts, a critic's values of them included
            alone = build(name, tmp_path / name, False)
            torch.nn.utils.vector_to_parameters(plain["after"], alone.model.parameters())
            torch.testing.assert_close(plain["states"], read(alone), rtol=1e-5, atol=1e-5)
            assert plain["states"].size(1) == 1 + (name == "ppo_head") + 3 * 16
            # A second call of the model on one process would leave the other waiting
            assert shared["sharing"].cached_passes == 0
