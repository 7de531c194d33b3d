"""
KL divergences between two policies, estimated on tokens that one of them sampled, and rules for their coefficient.

The policy that sampled decides which divergence is estimated: samples of p estimate KL(p‖q). Tokens that the policy
has just sampled estimate KL(π_θ‖π_ref). After an update the same tokens estimate KL(π_old‖π_θ), the penalty of PPO's
second variant.
"""

import math

import torch

from ..errors import require_one_of


KL_ESTIMATORS = ("k1", "k2", "k3")
KL_RULES = ("fixed", "ppo", "proportional", "exponential")


def kl_estimate(logps: torch.Tensor, other_logps: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    KL(p‖q) per token, from log-probabilities of tokens sampled from p (http://joschu.net/blog/kl-approx.html).

    `"k1"`: log p/q, unbiased, of both signs. `"k2"`: ½ (log p/q)², biased, small variance. `"k3"`: q/p − 1 − log q/p,
    unbiased and never negative.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities under p, the policy that sampled.
        other_logps (`torch.Tensor`):
            Log-probabilities under q.
        estimator (`str`):
            `"k1"`, `"k2"` or `"k3"`.

    Returns:
        `torch.Tensor` of the same shape.
    """
    require_one_of("estimator", estimator, KL_ESTIMATORS)
    log_ratio = logps - other_logps
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


def adapted_kl_coef(
    coef: float, kl: float, target: float, rule: str, *, horizon: float, samples: int, rate: float
) -> float:
    """
    The next coefficient of a KL penalty, given the KL that was measured.

    - `"fixed"`: unchanged.
    - `"ppo"`: halved below target/1.5, doubled above 1.5·target (https://huggingface.co/papers/1707.06347, sec. 4).
    - `"proportional"`: times 1 + clip(kl/target − 1, ±0.2) · samples/horizon
      (https://huggingface.co/papers/1909.08593, sec. 2.2).
    - `"exponential"`: times exp(rate · (kl − target)).

    Args:
        coef (`float`):
            The current coefficient.
        kl (`float`):
            Measured KL, in the unit of `target`: nats per completion or per token.
        target (`float`):
            Wanted KL.
        rule (`str`):
            One of `KL_RULES`.
        horizon (`float`):
            Completions over which `"proportional"` corrects a deviation.
        samples (`int`):
            Completions on which `kl` was measured.
        rate (`float`):
            Rate of `"exponential"`, per nat.

    Returns:
        `float`: the next coefficient, which is `coef` if `kl` isn't finite.
    """
    require_one_of("rule", rule, KL_RULES)
    if rule == "fixed" or not math.isfinite(kl):
        return coef
    if rule == "ppo":
        return coef / 2 if kl < target / 1.5 else coef * 2 if kl > target * 1.5 else coef
    if rule == "proportional":
        return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon)
    return coef * math.exp(min(rate * (kl - target), 50.0))
