"""
Trains with DeepSpeed ZeRO on two processes and saves the model: `deepspeed_worker.py OUTPUT SELECTION [CHECKPOINT]`.
Started by `test_deepspeed.py` with `accelerate launch`.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext
from trl_ext.curriculum.partial import weights_key


def main(output_dir: Path, selection: str, checkpoint: str | None) -> None:
    trainer = trl_ext.DAPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.first_token_even,
        args=trl_ext.DAPOConfig(
            **tiny.cpu_settings(
                output_dir,
                per_device_train_batch_size=4,
                updates_per_generation=1,
                rollout_selection=selection,
                warmup_steps=0,
                max_steps=3,
                save_strategy="steps",
                save_steps=2,
            )
        ),
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
    )
    assert trainer.is_deepspeed_enabled
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=checkpoint)
    rewards = trainer.roll_out([trainer.train_dataset[i] for i in range(3)], 2, seed=1).rewards
    target = output_dir / ("resumed" if checkpoint else "whole")
    trainer.save_model(str(target))
    model = trainer.accelerator.unwrap_model(trainer.model)
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            parameter.partition()  # which DeepSpeed doesn't with weights this small
            assert parameter.numel() == 0
    key = weights_key(model)
    if trainer.is_world_process_zero():
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        result = {"stage": stage, "counters": asdict(trainer.counters), "rewards": rewards, "key": key}
        torch.save(result, target / "result.pt")
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
