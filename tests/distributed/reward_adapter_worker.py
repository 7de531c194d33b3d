"""
Trains on two processes with a reward adapter on the policy's base, and writes its scores before and after, and what
each process computed: `reward_adapter_worker.py OUTPUT KIND`. Started by `test_reward_adapter.py`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from distributed.fsdp_worker import allow_fsdp_on_cpus

import trl_ext


PROMPTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 3 + ["w5"] * 2 + ["w3 w1"]
COMPLETIONS = [" w1", " w2 w2 w2", " w7 w8", " w1 w2 w3 w4 w5 w6", " w9", " w11"]


def is_sharded(model: Any, kind: str) -> bool:
    if kind == "fsdp":
        return any(isinstance(module, FSDPModule) for module in model.modules())
    return kind == "ddp" or all(hasattr(weight, "ds_id") for weight in model.parameters())


def main(output: Path, kind: str) -> None:
    if kind == "fsdp":
        allow_fsdp_on_cpus()
    reward = trl_ext.AdapterReward(output / "reward", batch_size=3)
    trainer = tiny.trainer(
        trl_ext.GRPOTrainer,
        output / "run",
        reward,
        {
            "model": str(output / "base"),
            "peft_config": tiny.lora(task_type="CAUSAL_LM"),
            "train_dataset": tiny.ragged(64),
        },
        per_device_train_batch_size=4,
        share_prefixes="always",
        max_steps=2,
    )
    assert trainer.accelerator.num_processes == 2
    (guard,) = trainer.reward_guards

    def scores() -> list[float]:
        return guard.func(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[]] * 6)

    found: dict[str, Any] = {"before": scores() if kind == "ddp" else None}
    trainer.train()
    assert is_sharded(trainer.model_wrapped, kind)
    found |= {"after": scores(), "passes": guard.func._sharing.passes, "packed": guard.func._sharing.packed_passes}
    trainer.save_model(str(output / "saved"))
    of_all = gather_object([found])
    if trainer.is_world_process_zero():
        torch.save(of_all, output / "found.pt")
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
