"""
Trains a tiny model for one step, with what a file of `recipes/accelerate` says and the method that it is for:
`recipes_worker.py NAME OUTPUT`, started by `test_recipes.py` with `accelerate launch`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from datasets import Dataset
from distributed.fsdp_worker import force_fsdp
from peft import LoraConfig

import trl_ext
from trl_ext.planner.layout_files import FILES


# The machines' type of numbers
BF16: dict[str, Any] = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}


def dpo(output_dir: Path, adapter: Any) -> Any:
    words = range(8)
    rows = {"prompt": ["w1 w2"] * 8, "chosen": [f"w{i} w4" for i in words], "rejected": [f"w{i} w5" for i in words]}
    settings = tiny.pair_settings(output_dir, max_steps=1, per_device_train_batch_size=2, **BF16)
    return trl_ext.DPOTrainer(
        model=str(output_dir / "base"),
        args=trl_ext.DPOConfig(**settings),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
    )


def sampling(trainer_class: Any, output_dir: Path, adapter: Any, **settings: Any) -> Any:
    settings |= {"max_steps": 1, "per_device_train_batch_size": 4, "ds3_gather_for_generation": False}
    model = {"model": str(output_dir / "base"), "peft_config": adapter}
    return tiny.trainer(trainer_class, output_dir, tiny.low_ids, model, **BF16, **settings)


def ppo(output_dir: Path, adapter: Any) -> Any:
    return sampling(trl_ext.PPOTrainer, output_dir, adapter, critic="head", num_generations=1)


def dapo(output_dir: Path, adapter: Any) -> Any:
    return sampling(trl_ext.DAPOTrainer, output_dir, adapter, updates_per_generation=1)


def main(name: str, output_dir: Path) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        force_fsdp()
    job = FILES[name].job
    trainer = {"dpo": dpo, "ppo": ppo, "dapo": dapo}[job.method](
        output_dir, None if job.is_full else LoraConfig(**LORA)
    )
    trainer.train()
    plugin = trainer.accelerator.state.deepspeed_plugin
    found = {
        "kind": str(trainer.accelerator.distributed_type.value),
        "processes": trainer.accelerator.num_processes,
        "zero": {} if plugin is None else plugin.hf_ds_config.config["zero_optimization"],
        "bf16": trainer.deepspeed.bfloat16_enabled() if plugin is not None else trainer.accelerator.mixed_precision,
        "sharded": all(hasattr(p, "ds_id") for p in trainer.model.parameters()),
        "fsdp": any(isinstance(module, FSDPModule) for module in trainer.model_wrapped.modules()),
        "host_optimizer": "CPUAdam" in str(type(getattr(getattr(trainer.deepspeed, "optimizer", 0), "optimizer", 0))),
        "log": trainer.state.log_history[0],
        "step": trainer.state.global_step,
    }
    trainer.save_model(str(output_dir / "trained"))
    if trainer.is_world_process_zero():
        torch.save(found, output_dir / "found.pt")
    tiny.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
