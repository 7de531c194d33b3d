"""
Trains with FSDP2 on two processes, with shared prompts and without: `fsdp_worker.py OUTPUT`. Started by `test_fsdp.py`
with torchrun.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from distributed.deepspeed_worker import read

import trl_ext
from benchmarks.fsdp_on_cpus import force_fsdp


CASES: dict[str, Any] = {
    "grpo": (trl_ext.GRPOTrainer, {}),
    # The processes choose prompts by what they read together
    "informed_lora": (trl_ext.DAPOTrainer, {"refill_draws": "informed", "adapted": True}),
    "ppo_adapter": (trl_ext.PPOTrainer, {"critic": "adapter", "critic_learning_rate": 0.1, "adapted": True}),
    "ppo_head": (trl_ext.PPOTrainer, {"critic": "head", "critic_trunk_grad": 0.5, "critic_learning_rate": 0.1}),
}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def allow_fsdp_on_cpus(settings: dict[str, str] | None = None) -> None:
    """[`force_fsdp`], with variables of the tests' own, and `settings`."""
    force_fsdp()
    os.environ.update({**FSDP2, **(settings or {})})


def weights(model: Any) -> torch.Tensor:
    """All weights of all processes as one vector."""
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters()])


def policy(adapted: bool) -> Any:
    """In float64, with an adapter or without."""
    torch.manual_seed(4)
    return get_peft_model(tiny.stopping(), tiny.lora()).double() if adapted else tiny.stopping().double()


def build(name: str, output_dir: Path, share: Any) -> Any:
    """Two optimizer steps in float64, whose rounding is far below what the steps move."""
    trainer_class, settings = CASES[name]
    settings = dict(settings)
    return tiny.trainer(
        trainer_class,
        output_dir,
        arguments={"model": policy(settings.pop("adapted", False)), "train_dataset": tiny.ragged(64)},
        share_prefixes=share,
        per_device_train_batch_size=4,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=0.1,
        max_steps=2,
        **settings,
    )


def train(name: str, output_dir: Path, share: Any) -> dict[str, Any]:
    trainer = build(name, output_dir, share)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    assert any(isinstance(module, FSDPModule) for module in trainer.model_wrapped.modules())
    return {"before": before, "after": weights(trainer.model), "sharing": trainer.sharing, "states": read(trainer)}


def main(output_dir: Path) -> None:
    allow_fsdp_on_cpus()
    found = {
        name: {how: train(name, output_dir / f"{name}_{how}", how) for how in (False, "always")} for name in CASES
    }
    if int(os.environ["RANK"]) == 0:
        torch.save(found, output_dir / "found.pt")
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
