"""
How far a policy has moved from its reference, on completions of its own: the Kullback-Leibler divergence that the
penalties of PPO and GRPO hold down, in nats per completion.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..roles.switching import using_adapter
from ..roles.trunk import REFERENCE_ADAPTER
from ..rollouts.rollout import Rollout


KL = "kl"  # its name among what is measured


def token_inputs(trainer: Any, rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(B, L)` of prompts and completions, padded on the right."""
    sequences = [torch.tensor(rollout.prompt_ids + rollout.completion_ids) for rollout in rollouts]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    attention_mask = (torch.arange(input_ids.size(1)) < lengths.unsqueeze(1)).long()
    device = trainer.model.device
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def reference_logps(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """
    Log-probabilities `(B, L − 1)` of all tokens but the first, of the reference model, the reference adapter or the
    model without its adapter. `None` if there is none of them.
    """
    if trainer.ref_model is not None:
        return _logps(trainer.ref_model, inputs)
    adapters = getattr(trainer.model, "peft_config", None)
    if adapters is None:
        return None
    with using_adapter(trainer.model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in adapters else None):
        return _logps(trainer.model, inputs)


def _logps(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    logps: torch.Tensor = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    return logps


@torch.no_grad()
def kl_of_completions(trainer: Any, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """
    `log π_θ(y|x) − log π_ref(y|x)` of completions that the policy sampled. Its mean over samples is KL(π_θ‖π_ref),
    without bias; a single one may be negative (http://joschu.net/blog/kl-approx.html, k1).

    Args:
        trainer ([`GRPOTrainer`]):
            A trainer, as it is now. Under ZeRO-3 and FSDP, every process must make the call, with equally many.
        rollouts (`Sequence[Rollout]`):
            B completions. Tokens that a tool wrote don't count.

    Returns:
        `torch.Tensor` of shape `(B,)`: nats, on the CPU. NaN if the trainer has no reference, and for prompts with
        images.
    """
    found = torch.full((len(rollouts),), float("nan"), dtype=torch.float64)
    if not rollouts or any(rollout.images or rollout.tool_images for rollout in rollouts):
        return found
    size, training = trainer.args.per_device_train_batch_size, trainer.model.training
    trainer.model.eval()
    try:
        for start in range(0, len(rollouts), size):
            part = rollouts[start : start + size]
            inputs = token_inputs(trainer, part)
            reference = reference_logps(trainer, inputs)
            if reference is None:
                return found
            moved = (_logps(trainer.model, inputs) - reference).cpu().double()  # of token t + 1 in column t
            for i, rollout in enumerate(part):
                first = len(rollout.prompt_ids) - 1
                own = moved[i, first : first + len(rollout.completion_ids)]
                if rollout.tool_mask is not None:
                    own = own * torch.tensor(rollout.tool_mask)
                found[start + i] = own.sum()
    finally:
        trainer.model.train(training)
    return found
