"""
The loss of a critic, how much it explains, and whitening.

Sums over the tokens of all ranks go through a function `reduce` that the caller passes: it takes a tensor with this
rank's sums and returns the sums over all ranks.
"""

from collections.abc import Callable

import torch


Reduce = Callable[[torch.Tensor], torch.Tensor]


def only_here(sums: torch.Tensor) -> torch.Tensor:
    """The `reduce` of a single rank."""
    return sums


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ½ (V − R)² for each token, or the same with V clipped to V_old ± `clip_range` where that is larger (PPO's value
    clipping, as in OpenAI's baselines; without clipping it is eq. 9's L^VF of https://huggingface.co/papers/1707.06347,
    halved).

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            V of the critic as it is.
        old_values (`torch.Tensor` of shape `(B, T)`):
            V_old, of the critic at rollout time.
        returns (`torch.Tensor` of shape `(B, T)`):
            R, the targets.
        clip_range (`float`, *optional*):
            `None`: no clipping.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(B, T)`: the loss, and 1.0 where the clipped term is larger.
    """
    unclipped = (values - returns).square()
    if clip_range is None:
        return 0.5 * unclipped, torch.zeros_like(unclipped)
    clipped = (values.clamp(old_values - clip_range, old_values + clip_range) - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def masked_moments(
    values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = only_here
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and unbiased variance of the masked values of all ranks, as tensors. The variance of fewer than two values is
    0.
    """
    mask = mask.bool()
    count, total = reduce(torch.stack([mask.sum().to(values.dtype), values[mask].sum()]))
    mean = total / count.clamp(min=1)
    squares = reduce((values[mask] - mean).square().sum().view(1))[0]
    return mean, squares / (count - 1).clamp(min=1)


def whiten(
    values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, reduce: Reduce = only_here
) -> torch.Tensor:
    """
    (x − mean)/√(variance + 1e-8) over the masked values of all ranks, with TRL's and OpenAI's guard.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            The values.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on the values that count; the result is 0 elsewhere.
        shift_mean (`bool`):
            Whether the mean is subtracted.
        reduce (`Callable`, *optional*):
            Sums over ranks.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask.bool()


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce = only_here
) -> float:
    """
    1 − Var(R − V)/Var(R): 1 for a perfect critic, 0 for a constant one, negative for a critic that is worse than a
    constant. NaN if the returns don't vary.
    """
    _, residual = masked_moments(returns - values, mask, reduce)
    _, total = masked_moments(returns, mask, reduce)
    return float(1 - residual / total) if total > 0 else float("nan")
