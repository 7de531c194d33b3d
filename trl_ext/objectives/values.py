"""
What a critic is fitted to and judged by, and whitening. Sums over all tokens of all ranks go through a `reduce` that
the caller passes: from a tensor of this rank's sums to those of all.
"""

from collections.abc import Callable

import torch


Reduce = Callable[[torch.Tensor], torch.Tensor]


def _only_here(sums: torch.Tensor) -> torch.Tensor:
    return sums


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ½ (V − R)² per token or, where it is larger, the same of a V that moved at most `clip_range` from the one at
    rollout time (PPO's value clipping, as in OpenAI's baselines).

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            V now.
        old_values (`torch.Tensor` of shape `(B, T)`):
            V at rollout time.
        returns (`torch.Tensor` of shape `(B, T)`):
            What is fitted.
        clip_range (`float`, *optional*):
            `None`: no clipping.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(B, T)`: loss, and 1.0 where the clipped term is the larger one.
    """
    unclipped = (values - returns).square()
    if clip_range is None:
        return 0.5 * unclipped, torch.zeros_like(unclipped)
    clipped = (values.clamp(old_values - clip_range, old_values + clip_range) - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def masked_moments(
    values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _only_here
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of the masked values of all ranks, as tensors; a variance of 0 below two values."""
    mask = mask.bool()
    count, total = reduce(torch.stack([mask.sum().to(values.dtype), values[mask].sum()]))
    mean = total / count.clamp(min=1)
    squares = reduce((values[mask] - mean).square().sum().view(1))[0]
    return mean, squares / (count - 1).clamp(min=1)


def whiten(
    values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, reduce: Reduce = _only_here
) -> torch.Tensor:
    """
    (x − mean)/√(variance + 1e-8) over the masked values of all ranks, with TRL's and OpenAI's guard.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            What to whiten.
        mask (`torch.Tensor` of shape `(B, T)`):
            What counts; 0 in the result elsewhere.
        shift_mean (`bool`):
            `False` keeps the mean.
        reduce (`Callable`, *optional*):
            Sums over ranks.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask.bool()


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _only_here
) -> float:
    """
    1 − Var(R − V)/Var(R): 1 for a perfect critic, 0 for a constant one, below 0 for one that is worse than none. NaN
    where the returns don't vary.
    """
    _, residual = masked_moments(returns - values, mask, reduce)
    _, total = masked_moments(returns, mask, reduce)
    return float(1 - residual / total) if total > 0 else float("nan")
