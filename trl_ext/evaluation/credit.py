"""
Which token of a completion earned what? A trained critic's opinion on a few completions: the value of the state before
each token, the advantage the token got, and how much more likely the policy has become to write it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.utils import use_adapter

from ..objectives.advantages import aggregate_rewards
from ..objectives.gae import gae
from ..objectives.kl import kl_estimate
from ..roles.critic import logps_and_values
from ..rollouts.rollout import Rollout


@dataclass(frozen=True)
class TokenCredit:
    """
    A completion, token by token.

    Args:
        prompt (`str`):
            The prompt; of a conversation, its last message.
        tokens (`list[str]`):
            The completion.
        values (`list[float]`):
            V of the state in which each token was written.
        advantages (`list[float]`):
            Generalised advantages, before they are whitened. 0 on tokens that the policy didn't write.
        ratios (`list[float]`, *optional*):
            π_θ/π_ref of each token. `None` where there is no reference.
        score (`float`):
            Weighted sum of the rewards, in the units of values and advantages: divided by what `reward_scaling` says.
        rewards (`dict[str, float]`):
            Reward by function.
    """

    prompt: str
    tokens: list[str]
    values: list[float]
    advantages: list[float]
    ratios: list[float] | None
    score: float
    rewards: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def credit_by_token(trainer: Any, rows: list[dict[str, Any]], seed: int = 0) -> list[TokenCredit]:
    """
    Samples a completion for each prompt and credits its tokens as PPO does: scores at the last token, or at the steps
    for which they were given, less the KL penalty, through generalised advantage estimation with the trainer's γ and
    λ. Scores are scaled as in training; clipping and whitening are left out. Leaves no trace in the run.

    Args:
        trainer ([`PPOTrainer`]):
            A trainer with a critic, as it is now. Every process must make the call.
        rows (`list[dict]`):
            Data set rows; the same on every process.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.

    Returns:
        `list[TokenCredit]`: those of this process's share of the rows.
    """
    scored = trainer.roll_out(rows, 1, seed=seed)
    first = trainer.accelerator.process_index * len(scored.rollouts)
    everywhere = scored.rewards[:, 0]  # (P, F), of all processes
    scores = aggregate_rewards(everywhere, trainer.reward_weights.to(everywhere), "sum_then_normalize", 1)
    deviation = trainer.reward_deviation(scores.to(trainer.accelerator.device), training=False)
    share = slice(first, first + len(scored.rollouts))
    rewards, scores = everywhere[share].cpu(), scores[share].cpu().nan_to_num(nan=0.0) / deviation  # (B, F), (B,)
    rollouts = scored.rollouts[: len(rewards)]  # without those that only filled up the batch
    weights = [weight / deviation for weight in trainer.reward_weights.tolist()]

    # Every process makes the same passes, over all that it rolled out
    logps, reference, values, mask = _passes(trainer, scored.rollouts)
    earned = torch.zeros_like(values)
    for i, rollout in enumerate(rollouts):
        left = float(scores[i])
        for column, reward in rollout.step_rewards.items():
            for position, value in reward.steps:
                earned[i, position] += weights[column] * value
                left -= weights[column] * value
        earned[i, len(rollout.completion_ids) - 1] += left
    if reference is not None:
        earned -= trainer.kl_coef * kl_estimate(logps, reference, trainer.args.kl_estimator) * mask
    advantages, _ = gae(earned, values, mask, trainer.args.gamma, trainer.args.lam)

    decode = getattr(trainer.processing_class, "tokenizer", trainer.processing_class).decode
    credits = []
    for i, rollout in enumerate(rollouts):
        length = len(rollout.completion_ids)
        ratios = None if reference is None else (logps - reference)[i, :length].exp().tolist()
        named = zip(scored.reward_func_names, rewards[i].tolist(), strict=True)
        credits.append(
            TokenCredit(
                _text(rollout.prompt),
                [decode([token]) for token in rollout.completion_ids],
                values[i, :length].tolist(),
                advantages[i, :length].tolist(),
                ratios,
                float(scores[i]),
                {name: reward for name, reward in named if reward == reward},
            )
        )
    return credits


def _passes(
    trainer: Any, rollouts: Sequence[Rollout]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Log-probabilities under policy and reference, values and mask, all `(B, T)` and on the CPU."""
    sequences = [torch.tensor(rollout.prompt_ids + rollout.completion_ids) for rollout in rollouts]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    attention_mask = (torch.arange(input_ids.size(1)) < lengths.unsqueeze(1)).long()
    input_ids, attention_mask = input_ids.to(trainer.model.device), attention_mask.to(trainer.model.device)

    training = trainer.model.training
    trainer.model.eval()
    try:
        logps, values = logps_and_values(trainer.model, input_ids, attention_mask)
        reference = _reference_logps(trainer, input_ids, attention_mask)
    finally:
        trainer.model.train(training)

    longest = max(len(rollout.completion_ids) for rollout in rollouts)
    starts = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
    # Column t − 1 is the state before token t, and the log-probability of token t
    columns = starts.unsqueeze(1) + torch.arange(longest) - 1  # (B, T)
    written = columns < lengths.unsqueeze(1) - 1

    def of_completions(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu().float().gather(1, columns.clamp(max=tensor.size(1) - 1)) * written

    mask = written.float()
    for i, rollout in enumerate(rollouts):
        if rollout.tool_mask is not None:
            mask[i, : len(rollout.tool_mask)] *= torch.tensor(rollout.tool_mask)
    reference = None if reference is None else of_completions(reference)
    return of_completions(logps), reference, of_completions(values), mask


def _reference_logps(trainer: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "fused_lm_head": True}
    if trainer.ref_model is not None:
        logps: torch.Tensor = trainer.ref_model(**inputs).log_probs
        return logps
    adapters = getattr(trainer.model, "peft_config", None)
    if adapters is None:
        return None
    with use_adapter(trainer.model, "ref" if "ref" in adapters else None):
        return trainer.model(**inputs).log_probs


def _text(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text if isinstance(text, str) else str(text)
