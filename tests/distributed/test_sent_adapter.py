"""What a colocated vLLM engine gets with `vllm_sync="adapter"` where the policy is spread over processes."""

from pathlib import Path

import pytest
import torch
from distributed.test_deepspeed import start
from peft import load_peft_weights
from processes import run


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("sent_adapter_worker.py")


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_every_process_sends_the_whole_adapter(engine, tmp_path):
    """
    The one that is trained, and not the critic's, beside PEFT's file of it. ZeRO-3 leaves weights as small as these
    whole, so that TRL's gathering of larger ones is not seen here.
    """
    if engine == "zero3":
        start(tmp_path, 3, WORKER, tmp_path, engine)
    else:
        run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, tmp_path, engine])
    saved = load_peft_weights(str(tmp_path / "saved"), device="cpu")
    assert len(saved) == 2 * 7 * 2 and all(weight.any() for weight in saved.values())  # A and B of each linear layer
    for process in range(2):
        sent = load_peft_weights(str(tmp_path / f"sent_{process}"), device="cpu")
        assert sent.keys() == saved.keys()
        assert all(torch.equal(sent[name], weight) for name, weight in saved.items())
