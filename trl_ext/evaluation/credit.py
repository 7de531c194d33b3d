"""
Which token of a completion earned what? A trained critic's opinion on a few completions: the value of the state before
each token, the advantage of the token, and how much more likely the policy has become to write it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import shown
from ..objectives.advantages import aggregate_rewards
from ..objectives.credit import completions_that_end, estimate_credit, token_rewards
from ..objectives.kl import kl_estimate
from ..roles.critic import logps_and_values
from ..rollouts.rollout import Rollout
from .divergence import reference_logps, token_inputs


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
            Generalised advantages, before they are whitened. 0 on tokens that the policy didn't write, and in
            completions that no reward function could score.
        ratios (`list[float]`, *optional*):
            π_θ/π_ref of each token. `None` if there is no reference.
        score (`float`):
            Weighted sum of the rewards, divided by the deviation of `reward_scaling`: in the units of values and
            advantages.
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


@dataclass(frozen=True)
class _Passes:
    """What the forward passes over some rollouts gave, on the CPU."""

    logps: torch.Tensor  # (B, T)
    reference_logps: torch.Tensor | None  # (B, T)
    state_values: torch.Tensor  # (B, T + 1), before each token and after the last
    completion_ids: torch.Tensor  # (B, T)
    completion_mask: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T), 1 on the tokens that the policy wrote


@torch.no_grad()
def credit_by_token(trainer: Any, rows: list[dict[str, Any]], seed: int = 0) -> list[TokenCredit]:
    """
    Samples a completion for each prompt and credits its tokens with the functions and the settings of training
    ([`~trl_ext.objectives.credit`]); only the whitening of advantages is left out. Leaves no trace in the run.

    Args:
        trainer ([`PPOTrainer`]):
            A trainer with a critic, as it is now. Every process must make the call.
        rows (`list[dict]`):
            Data set rows; the same on every process.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.

    Returns:
        `list[TokenCredit]`: one for each row of this process's share.
    """
    if not getattr(trainer, "has_value_loss", False):
        raise TypeError(f"trainer is {shown(trainer)}, which has no critic. Pass a PPOTrainer.")
    scored = trainer.roll_out(rows, 1, seed=seed)
    everywhere = scored.rewards[:, 0].cpu()  # (P, F), of all processes
    weights = trainer.reward_weights.to(everywhere)
    all_scores = aggregate_rewards(everywhere, weights, "sum_then_normalize", 1)
    deviation = trainer.reward_deviation(all_scores, training=False)
    first, count = trainer.accelerator.process_index * len(scored.rollouts), len(scored.rollouts)
    rewards, scores = everywhere[first : first + count], all_scores[first : first + count]

    # Every process makes the same passes, over all that it rolled out; some of the last only fill up the batch
    passes = _passes(trainer, scored.rollouts)
    advantages = _advantages(trainer, scored.rollouts, rewards, scores, deviation, passes)
    decode = getattr(trainer.processing_class, "tokenizer", trainer.processing_class).decode
    credits = []
    for i, rollout in enumerate(scored.rollouts[: len(rewards)]):
        length = len(rollout.completion_ids)
        reference = passes.reference_logps
        ratios = None if reference is None else (passes.logps - reference)[i, :length].exp().tolist()
        named = zip(scored.reward_func_names, rewards[i].tolist(), strict=True)
        credits.append(
            TokenCredit(
                _text(rollout.prompt),
                [decode([token]) for token in rollout.completion_ids],
                passes.state_values[i, :length].tolist(),
                advantages[i, :length].tolist(),
                ratios,
                float(scores[i].nan_to_num(nan=0.0)) / deviation,
                {name: reward for name, reward in named if reward == reward},
            )
        )
    return credits


def _advantages(
    trainer: Any,
    rollouts: Sequence[Rollout],
    rewards: torch.Tensor,
    scores: torch.Tensor,
    deviation: float,
    passes: _Passes,
) -> torch.Tensor:
    """`(B, T)`, as the trainer computes them from these rewards `(b, F)` and scores `(b,)`, without whitening."""
    real, args = len(rewards), trainer.args
    completion_mask, mask = passes.completion_mask[:real], passes.mask[:real]
    ended = completions_that_end(passes.completion_ids[:real], completion_mask, trainer.eos_token_ids)
    by_column: list[dict[int, Any]] = [{**rollout.step_rewards} for rollout in rollouts[:real]]
    earned = token_rewards(
        rewards,
        trainer.reward_weights,
        [{column: reward.steps for column, reward in row.items()} for row in by_column],
        completion_mask,
        ended,
        deviation=deviation,
        clip=args.reward_clip,
        missing_eos_penalty=args.missing_eos_penalty,
    )
    kl = None
    if passes.reference_logps is not None:
        kl = kl_estimate(passes.logps, passes.reference_logps, args.kl_estimator)[:real] * mask

    def over_processes(sums: torch.Tensor) -> torch.Tensor:
        reduced: torch.Tensor = trainer.accelerator.reduce(sums.to(trainer.accelerator.device), reduction="sum")
        return reduced.cpu()

    settings = replace(trainer.credit_settings, whiten_advantages=False)
    credit, _ = estimate_credit(
        earned, kl, passes.state_values[:real], completion_mask, mask, ended, scores, settings, over_processes
    )
    return credit.advantages


def _passes(trainer: Any, rollouts: Sequence[Rollout]) -> _Passes:
    inputs = token_inputs(trainer, rollouts)
    lengths = inputs["attention_mask"].sum(dim=1).cpu()

    training = trainer.model.training
    trainer.model.eval()
    try:
        logps, state_values = logps_and_values(trainer.model, **inputs)
        reference = reference_logps(trainer, inputs)
    finally:
        trainer.model.train(training)

    longest = max(len(rollout.completion_ids) for rollout in rollouts)
    starts = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts]).unsqueeze(1)
    # Column start − 1 + t is the state before token t of the completion, and the log-probability of that token
    columns = starts - 1 + torch.arange(longest + 1)  # (B, T + 1)
    written = columns[:, :-1] < lengths.unsqueeze(1) - 1  # (B, T)

    def of_completions(tensor: torch.Tensor, columns: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return tensor.cpu().float().gather(1, columns.clamp(max=tensor.size(1) - 1)) * known

    mask = written.long()
    for i, rollout in enumerate(rollouts):
        if rollout.tool_mask is not None:
            mask[i, : len(rollout.tool_mask)] *= torch.tensor(rollout.tool_mask)
    completions = [torch.tensor(rollout.completion_ids) for rollout in rollouts]
    if reference is not None:
        reference = of_completions(reference, columns[:, :-1], written)
    return _Passes(
        of_completions(logps, columns[:, :-1], written),
        reference,
        of_completions(state_values, columns, columns < lengths.unsqueeze(1)),
        torch.nn.utils.rnn.pad_sequence(completions, batch_first=True),
        written.long(),
        mask,
    )


def _text(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text if isinstance(text, str) else str(text)
