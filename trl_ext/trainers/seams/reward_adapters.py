"""
Reward models that are adapters on the policy's own base: loaded into the policy once TRL has constructed the trainer,
because TRL may give the policy its own adapter only then, and takes what is trained for a quantized base to bfloat16.
"""

from typing import Any

from ...rewards.adapter import AdapterReward
from ...rollouts.last_states import sharing_for
from .prefixes import attention_of


def attach_reward_adapters(trainer: Any) -> None:
    """Replace the reward functions of a trainer that share its policy's base by copies that know the policy."""
    policy, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    for i, func in enumerate(trainer.reward_funcs):
        if isinstance(func, AdapterReward):
            always, multiple = args.share_prefixes == "always", int(trainer.pad_to_multiple_of or 1)
            shares = args.fit_micro_batches and args.share_prefixes
            trainer.reward_funcs[i] = func.attached(
                policy,
                model=lambda: trainer.model,  # engines put another in its place when training begins
                tokenizer=trainer.processing_class,
                batch_size=args.per_device_train_batch_size,
                sharing=sharing_for(policy, attention_of(policy), always, multiple) if shares else None,
                chat_template_kwargs=trainer.chat_template_kwargs,
            )
