"""
A disk that is full in the middle of a save, in processes of their own: a small tmpfs, where the system allows one
(`No space left on device`), and a limit on the size of files elsewhere (`File too large`).
"""

from pathlib import Path

import pytest
import tiny
import torch
from processes import start
from resume.cases import built


WORKER = Path(__file__).with_name("full_disk_worker.py")
NO_DISK = 77


@pytest.mark.train
@pytest.mark.parametrize(("trainer", "disk"), [("DAPO", "tmpfs"), ("PPO model", "limit"), ("DPO", "tmpfs")])
def test_the_last_checkpoint_stays_whole_and_the_run_goes_on_from_it(trainer, disk, tmp_path):
    process = start([WORKER, trainer, tmp_path, disk])
    status = process.wait()
    if status == NO_DISK:
        pytest.skip("this system lets no process mount a disk of its own")
    text = process.output.read_text(errors="replace")
    assert status == 0, process.printed()
    assert "The checkpoint of step 2 was not written. checkpoint-1 is as it was: go on with" in text
    assert any(cause in text for cause in ("No space left on device", "File too large", "file write failed")), text
    whole = built(trainer, "plain", tmp_path, tmp_path / "whole")
    whole.train()
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, value in tiny.weights(whole.model).items():
        assert torch.equal(found[name], value), name
