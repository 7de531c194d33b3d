"""
Which token of a completion earned what: from rewards and the values of a critic to advantages and returns.

[`token_rewards`] puts the rewards of a completion on its tokens. [`estimate_credit`] subtracts the KL penalty and
turns the result into advantages and returns. The trainer and the picture of credit (`evaluation/credit.py`) both call
these two functions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..metric_keys import EXPLAINED_VARIANCE, KL_PER_COMPLETION, NON_SCORE_REWARD
from .gae import carried_back, gae, length_adaptive_lam
from .values import Reduce, explained_variance, only_here, whiten


# Metrics that are means over the tokens that are credited
MEANS_OVER_TOKENS = MEAN_VALUE, MEAN_RETURN = "val/value", "val/return"


@dataclass(frozen=True)
class CreditSettings:
    """
    How advantages and returns are computed; `PPOConfig` describes each argument and has the defaults.

    Args:
        gamma (`float`):
            Discount γ.
        lam (`float`):
            λ of the advantages.
        lam_alpha (`float`, *optional*):
            α of the length-adaptive λ, which then replaces `lam` for the advantages.
        critic_lam (`float`, *optional*):
            λ of the returns. `None`: `lam`.
        bootstrap_truncated (`bool`):
            Whether a completion that was cut off is worth the value of its last state.
        whiten_rewards (`bool`):
            Whether token rewards are scaled to variance 1.
        whiten_advantages (`bool`):
            Whether advantages are whitened.
        kl_coef (`float`):
            Weight of the KL penalty on each token.
    """

    gamma: float
    lam: float
    lam_alpha: float | None
    critic_lam: float | None
    bootstrap_truncated: bool
    whiten_rewards: bool
    whiten_advantages: bool
    kl_coef: float


@dataclass(frozen=True)
class Credit:
    """
    What the tokens of some completions earned.

    Args:
        advantages, returns, values (`torch.Tensor` of shape `(B, T)`):
            Advantages; targets of the critic; V of the state in which each token was written. 0 on tokens that the
            policy didn't write.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on the tokens that are credited: the policy's own, in completions that have a score.
        completions (`int`):
            Number of completions on all ranks, without those that are left out (`mask_truncated_completions`).
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    completions: int


def completions_that_end(
    completion_ids: torch.Tensor, completion_mask: torch.Tensor, eos_token_ids: Sequence[int]
) -> torch.Tensor:
    """
    Whether the last token of each completion is an end-of-sequence token.

    Args:
        completion_ids, completion_mask (`torch.Tensor` of shape `(B, T)`):
            Completions, padded on the right; a row may be empty.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.

    Returns:
        `torch.Tensor` of shape `(B,)`, of booleans.
    """
    lengths = completion_mask.sum(dim=1)
    last = completion_ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
    return torch.isin(last, torch.tensor(eos_token_ids, device=last.device)).squeeze(1) & (lengths > 0)


def token_rewards(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    step_rewards: Sequence[Mapping[int, Iterable[tuple[int, float]]]],
    completion_mask: torch.Tensor,
    ended: torch.Tensor,
    *,
    deviation: float,
    clip: float | None,
    missing_eos_penalty: float | None,
) -> torch.Tensor:
    """
    The weighted rewards of completions, token by token: rewards of steps at the tokens that end these steps, all other
    rewards at the last token. They are divided by `deviation`, then clipped, then less the penalty.

    Args:
        rewards (`torch.Tensor` of shape `(B, F)`):
            Reward by function; NaN where a function doesn't apply.
        weights (`torch.Tensor` of shape `(F,)`):
            Weight of each function.
        step_rewards (`Sequence[Mapping[int, Iterable[tuple[int, float]]]]` of length `B`):
            Pairs of position and reward, for each column of `rewards` that holds the sum of such pairs.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            1 on the tokens of a completion, 0 on padding.
        ended (`torch.Tensor` of shape `(B,)`):
            From [`completions_that_end`].
        deviation (`float`):
            Divisor of all rewards.
        clip (`float`, *optional*):
            Largest magnitude of the reward of a token. `None`: no limit.
        missing_eos_penalty (`float`, *optional*):
            Subtracted at the last token of completions that didn't end.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    earned = torch.zeros_like(completion_mask, dtype=torch.float32)
    at_the_end = (rewards * weights.to(rewards)).nan_to_num(nan=0.0)  # (B, F)
    for row, by_column in enumerate(step_rewards):
        for column, steps in by_column.items():
            at_the_end[row, column] = 0.0
            for position, reward in steps:
                earned[row, position] += float(weights[column]) * reward
    last = (completion_mask.sum(dim=1) - 1).clamp(min=0).unsqueeze(1)
    earned = earned.scatter_add(1, last, at_the_end.sum(dim=1, keepdim=True)) / deviation
    if clip is not None:
        earned = earned.clamp(-clip, clip)
    if missing_eos_penalty is not None:
        penalty = ~ended * missing_eos_penalty
        earned = earned.scatter_add(1, last, -penalty.unsqueeze(1).float())
    return earned


@torch.no_grad()
def estimate_credit(
    token_rewards: torch.Tensor,
    per_token_kl: torch.Tensor | None,
    state_values: torch.Tensor,
    completion_mask: torch.Tensor,
    mask: torch.Tensor,
    ended: torch.Tensor,
    scores: torch.Tensor,
    settings: CreditSettings,
    reduce: Reduce = only_here,
) -> tuple[Credit, dict[str, float]]:
    """
    Advantages and returns by generalised advantage estimation ([`~trl_ext.objectives.gae.gae`]) of the rewards
    r_t = token reward − kl_coef·KL_t (https://huggingface.co/papers/1909.08593, eq. 2).

    Args:
        token_rewards (`torch.Tensor` of shape `(B, T)`):
            Result of [`token_rewards`], without KL.
        per_token_kl (`torch.Tensor` of shape `(B, T)`, *optional*):
            Estimated KL to the reference; 0 where `mask` is 0. `None`: there is no reference.
        state_values (`torch.Tensor` of shape `(B, T + 1)`):
            V before each token, and after the last.
        completion_mask, mask (`torch.Tensor` of shape `(B, T)`):
            1 on the tokens of a completion; 1 on those of them that the policy wrote.
        ended (`torch.Tensor` of shape `(B,)`):
            Result of [`completions_that_end`].
        scores (`torch.Tensor` of shape `(B,)`):
            Weighted sum of the rewards. NaN: no reward function applied, and the completion teaches nothing (its
            advantages are 0, its returns are its values).
        settings ([`CreditSettings`]):
            How to compute them.
        reduce (`Callable`, *optional*):
            Sums over ranks.

    Returns:
        `tuple[Credit, dict[str, float]]`: the credit, and metrics over all ranks under TRL 1.12's names.
    """
    lengths, scored = completion_mask.sum(dim=1), ~scores.isnan().unsqueeze(1)
    credited = mask * scored
    penalised = token_rewards if per_token_kl is None else token_rewards - settings.kl_coef * per_token_kl
    earned = penalised * completion_mask
    if settings.whiten_rewards:
        earned = whiten(carried_back(earned, mask), credited, shift_mean=False, reduce=reduce)
    values = state_values[:, :-1] * mask
    last_values = None
    if settings.bootstrap_truncated:
        last_values = state_values.gather(1, lengths.unsqueeze(1)).squeeze(1) * ~ended
    advantages, returns = _advantages_and_returns(earned, values, mask, last_values, settings)
    returns = torch.where(scored, returns, values)
    explained = explained_variance(values, returns, credited, reduce)
    if settings.whiten_advantages:
        advantages = whiten(advantages, credited, reduce=reduce)
    # An empty row fills up a micro-batch, or is a completion that is left out
    real = int((lengths > 0).sum())
    completions, metrics = _metrics(real, per_token_kl, credited, values, returns, settings.kl_coef, reduce)
    credit = Credit(advantages * credited, returns, values, credited, completions)
    return credit, metrics | {EXPLAINED_VARIANCE: explained}


def _advantages_and_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    last_values: torch.Tensor | None,
    settings: CreditSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, T)` each; advantages and returns may have different λ (https://huggingface.co/papers/2504.05118)."""
    lam: float | torch.Tensor = settings.lam
    if settings.lam_alpha is not None:
        lam = length_adaptive_lam(mask.sum(dim=1), settings.lam_alpha)
    advantages, returns = gae(rewards, values, mask, settings.gamma, lam, last_values)
    critic_lam = settings.lam if settings.critic_lam is None else settings.critic_lam
    if settings.lam_alpha is not None or critic_lam != settings.lam:
        _, returns = gae(rewards, values, mask, settings.gamma, critic_lam, last_values)
    return advantages, returns


def _metrics(
    rows: int,
    per_token_kl: torch.Tensor | None,
    mask: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    kl_coef: float,
    reduce: Reduce,
) -> tuple[int, dict[str, float]]:
    """Number of completions, and means over completions or tokens, of all ranks."""
    per_token = torch.zeros_like(values) if per_token_kl is None else per_token_kl
    parts = [rows, per_token.sum(), (kl_coef * per_token).sum(), mask.sum(), (values * mask).sum()]
    parts += [(returns * mask).sum()]
    sums = torch.stack([torch.as_tensor(part, device=values.device, dtype=torch.float32) for part in parts])
    completions, kl, penalty, tokens, value, target = reduce(sums).tolist()
    metrics = {MEAN_VALUE: value / max(tokens, 1), MEAN_RETURN: target / max(tokens, 1)}
    if per_token_kl is not None:
        # NaN, which TRL leaves out of its means, if no completion is left
        metrics[KL_PER_COMPLETION] = kl / completions if completions else math.nan
        metrics[NON_SCORE_REWARD] = -penalty / completions if completions else math.nan
    return int(completions), metrics
