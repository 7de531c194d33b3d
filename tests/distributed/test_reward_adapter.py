"""A reward adapter on the policy's base on two processes, which may each hold a part of the base."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed.reward_adapter_worker import COMPLETIONS, PROMPTS
from distributed.test_deepspeed import start
from peft import AutoPeftModelForSequenceClassification
from processes import run


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("reward_adapter_worker.py")


def alone(folder: str) -> torch.Tensor:
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        rows: Any = [tiny.tokenizer()(p + c, return_tensors="pt") for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        return torch.stack([model(row["input_ids"]).logits[0, 0] for row in rows])


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero3"])
def test_every_process_gets_the_scores_of_the_whole_model(kind, tmp_path):
    folder = tiny.reward_adapter(tmp_path)
    if kind == "zero3":
        start(tmp_path, 3, WORKER, tmp_path, kind)
    else:
        run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, tmp_path, kind])
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    wanted = alone(folder)
    assert len(found) == 2
    for of_process in found:
        torch.testing.assert_close(torch.tensor(of_process["after"]), wanted, rtol=1e-5, atol=1e-5)
        assert of_process["before"] in (None, of_process["after"])
        assert of_process["packed"] > 0
    assert found[0]["passes"] == found[1]["passes"]
    assert not (tmp_path / "saved/reward").exists()
