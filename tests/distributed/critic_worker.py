"""
PPO with a critic that is an adapter on the policy's base, with DeepSpeed ZeRO on two processes: `critic_worker.py
OUTPUT`. Started by `test_deepspeed.py` with `accelerate launch`.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext


def main(output_dir: Path) -> None:
    trainer = trl_ext.PPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.first_token_even,
        args=trl_ext.PPOConfig(
            **tiny.cpu_settings(output_dir, per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2),
            critic="adapter",
            critic_learning_rate=2e-2,
        ),
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(),
    )
    assert trainer.is_deepspeed_enabled and trainer.accelerator.num_processes == 2
    trainer.train()
    trainer.save_model(str(output_dir))
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
