"""
Trains full weights with DeepSpeed ZeRO-3, whose processes save their parts and no whole: `export_worker.py OUTPUT`.
Started by `test_deepspeed.py` with `accelerate launch`.
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext
from trl_ext.trainers.seams.whole_checkpoints import gathered_weights


def main(output_dir: Path) -> None:
    settings = tiny.cpu_settings(output_dir, per_device_train_batch_size=4, max_steps=1, num_generations=2)
    trainer = trl_ext.PPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.hashed,
        args=trl_ext.PPOConfig(**settings),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    assert trainer.is_deepspeed_enabled
    trainer.train()
    trainer.save_model()
    weights = gathered_weights(trainer.accelerator.unwrap_model(trainer.model))
    if trainer.is_world_process_zero():
        torch.save(weights, output_dir / "expected.pt")
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
