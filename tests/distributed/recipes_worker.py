"""
Trains a tiny model with LoRA for one step, with what `recipes/accelerate` says: `recipes_worker.py METHOD OUTPUT`,
started by `test_recipes.py` with `accelerate launch`.
"""

import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from datasets import Dataset
from peft import LoraConfig

import trl_ext


# The machines' type of numbers
BF16: dict[str, Any] = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}


def dpo(output_dir: Path) -> Any:
    words = range(8)
    rows = {"prompt": ["w1 w2"] * 8, "chosen": [f"w{i} w4" for i in words], "rejected": [f"w{i} w5" for i in words]}
    settings = tiny.cpu_settings(output_dir, max_steps=1, per_device_train_batch_size=2, **BF16)
    del settings["num_generations"], settings["max_completion_length"]
    return trl_ext.DPOTrainer(
        model=str(output_dir / "base"),
        args=trl_ext.DPOConfig(**settings),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**LORA),
    )


def ppo(output_dir: Path) -> Any:
    settings = {"num_generations": 1, "max_steps": 1, "per_device_train_batch_size": 4}
    return tiny.trainer(
        trl_ext.PPOTrainer,
        output_dir,
        tiny.low_ids,
        {"model": str(output_dir / "base"), "peft_config": LoraConfig(**LORA)},
        critic="head",
        ds3_gather_for_generation=False,
        **BF16,
        **settings,
    )


def main(method: str, output_dir: Path) -> None:
    trainer = {"dpo": dpo, "ppo": ppo}[method](output_dir)
    trainer.train()
    plugin = trainer.accelerator.state.deepspeed_plugin
    file = plugin.hf_ds_config.config["zero_optimization"]
    trainer.save_model(str(output_dir / "trained"))
    if trainer.is_world_process_zero():
        found = {
            "processes": trainer.accelerator.num_processes,
            "stage": plugin.zero_stage,
            "live": file["stage3_max_live_parameters"],
            "bf16": trainer.deepspeed.bfloat16_enabled(),
            "sharded": all(hasattr(p, "ds_id") for p in trainer.model.parameters()),
            "log": trainer.state.log_history[0],
            "step": trainer.state.global_step,
        }
        torch.save(found, output_dir / "found.pt")
    tiny.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
