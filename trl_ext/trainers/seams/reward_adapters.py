"""
Reward models that are adapters on the policy's own base: loaded into the policy once TRL has constructed the trainer,
because TRL may give the policy its own adapter only then, and takes what is trained for a quantized base to bfloat16.
"""

from typing import Any

from ...rewards.adapter import AdapterReward


def attach_reward_adapters(trainer: Any) -> None:
    """Replace the reward functions of a trainer that share its policy's base by copies that know the policy."""
    for i, func in enumerate(trainer.reward_funcs):
        if isinstance(func, AdapterReward):
            trainer.reward_funcs[i] = func.attached(
                trainer.accelerator.unwrap_model(trainer.model),
                model=lambda: trainer.model,  # engines put another in its place when training begins
                tokenizer=trainer.processing_class,
                batch_size=trainer.args.per_device_train_batch_size,
                share_prefixes=trainer.args.fit_micro_batches and trainer.args.share_prefixes,
                multiple=int(trainer.pad_to_multiple_of or 1),
                chat_template_kwargs=trainer.chat_template_kwargs,
            )
