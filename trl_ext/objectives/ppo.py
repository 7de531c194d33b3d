"""
The loss of PPO (https://huggingface.co/papers/1707.06347), given its clipped surrogate, which TRL computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .kl import kl_estimate
from .values import value_loss


@dataclass(frozen=True)
class PPOLossSettings:
    """
    Weights of the terms; `PPOConfig` describes each argument and has the defaults.

    Args:
        vf_coef (`float`):
            c₁ of the value loss.
        cliprange_value (`float`, *optional*):
            How far a value may move from the one at rollout time.
        old_kl_coef (`float`):
            β of KL(π_old‖π_θ).
        positive_nll_coef (`float`):
            μ of the negative log-likelihood of correct completions.
    """

    vf_coef: float
    cliprange_value: float | None
    old_kl_coef: float
    positive_nll_coef: float


def ppo_loss(
    surrogate: torch.Tensor,
    logps: torch.Tensor,
    values: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    settings: PPOLossSettings,
    policy_is_frozen: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    L = surrogate + c₁ L^VF (eq. 9, with the sign of a loss) + β KL(π_old‖π_θ) (eq. 8) + μ L^NLL (VAPO,
    https://huggingface.co/papers/2504.05118). The added terms are sums over the tokens that the policy wrote, divided
    by `tokens`.

    Args:
        surrogate (`torch.Tensor` of shape `()`):
            The clipped surrogate (eq. 7) as TRL computes it, with TRL's entropy bonus c₂ S if there is one.
        logps, values (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens and V of the states in which they were written, of policy and critic as
            they are.
        batch (`Mapping[str, torch.Tensor]`):
            `old_per_token_logps`, `old_values`, `returns`, `completion_mask` and, if environments wrote some tokens,
            `tool_mask`, of shape `(B, T)`; `is_right` of shape `(B,)` if there is a `positive_nll_coef`.
        tokens (`torch.Tensor` of shape `()`):
            Divisor of the sums.
        settings ([`PPOLossSettings`]):
            Weights of the terms.
        policy_is_frozen (`bool`, *optional*, defaults to `False`):
            Whether only the critic learns: L = c₁ L^VF.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: the loss, and sums over tokens for the metrics.
    """
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    old_logps = batch["old_per_token_logps"]
    by_value, clipped = value_loss(values, batch["old_values"], batch["returns"], settings.cliprange_value)
    old_kl = kl_estimate(old_logps, logps, "k3")  # the tokens are samples of π_old
    if policy_is_frozen:
        loss = (logps * 0.0).sum()  # the policy stays in the graph, on which all processes must agree
    else:
        loss = surrogate + _added_to_policy(logps, old_kl, mask, batch, tokens, settings)
    loss = loss + settings.vf_coef * (by_value * mask).sum() / tokens
    log_ratio = (logps - old_logps).detach() * mask
    sums = {
        "tokens": mask,
        "value_loss": by_value * mask,
        "clipped_values": clipped * mask,
        "approximate_kl": 0.5 * log_ratio.square(),
        "ratio": log_ratio.exp() * mask,
        "old_kl": old_kl * mask,
    }
    return loss, {name: part.detach().float().sum() for name, part in sums.items()}


def _added_to_policy(
    logps: torch.Tensor,
    old_kl: torch.Tensor,
    mask: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    settings: PPOLossSettings,
) -> torch.Tensor:
    """The terms that move the policy beside the surrogate."""
    added = logps.new_zeros(())
    if settings.old_kl_coef:
        added = added + settings.old_kl_coef * (old_kl * mask).sum() / tokens
    if settings.positive_nll_coef:
        right = mask * batch["is_right"].unsqueeze(1)
        added = added - settings.positive_nll_coef * (logps * right).sum() / tokens
    return added
