"""
The loss of PPO (https://huggingface.co/papers/1707.06347), given its clipped surrogate, which TRL computes, and the
table of terms that are added to it: `LOSS_TERMS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .kl import kl_estimate
from .values import value_loss


Batch = Mapping[str, torch.Tensor]


def old_policy_kl(logps: torch.Tensor, batch: Batch) -> torch.Tensor:
    """KL(π_old‖π_θ) by k3 (eq. 8): the tokens are samples of π_old."""
    return kl_estimate(batch["old_per_token_logps"], logps, "k3")


def positive_nll(logps: torch.Tensor, batch: Batch) -> torch.Tensor:
    """
    The negative log-likelihood of correct completions (VAPO, https://huggingface.co/papers/2504.05118): a mean over
    their tokens alone. Divided by their share of all tokens here, and by all tokens with the other terms.
    """
    return -(logps * batch["is_right"].unsqueeze(1)) / batch["right_share"].clamp(min=1e-12)


# Terms that move the policy beside the surrogate: from its log-probabilities `(B, T)` and the micro-batch to a value
# for each token `(B, T)`, which is summed over the tokens that the policy wrote. A new term is a function above and an
# entry here; `PPOConfig(loss_terms={"name": 0.1})` gives it a weight.
LOSS_TERMS: dict[str, Callable[[torch.Tensor, Batch], torch.Tensor]] = {
    "old_policy_kl": old_policy_kl,
    "positive_nll": positive_nll,
}


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
        loss_terms (`Mapping[str, float]`):
            Weights of further terms, by their names in `LOSS_TERMS`.
    """

    vf_coef: float
    cliprange_value: float | None
    old_kl_coef: float
    positive_nll_coef: float
    loss_terms: Mapping[str, float]

    @property
    def weights(self) -> dict[str, float]:
        """Of all terms that move the policy beside the surrogate."""
        named = {"old_policy_kl": self.old_kl_coef, "positive_nll": self.positive_nll_coef}
        return {name: weight for name, weight in {**named, **self.loss_terms}.items() if weight}


def ppo_loss(
    surrogate: torch.Tensor,
    logps: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    tokens: torch.Tensor,
    settings: PPOLossSettings,
    policy_is_frozen: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    L = surrogate + c₁ L^VF (eq. 9, with the sign of a loss) + the weighted terms of `LOSS_TERMS`. The added terms are
    sums over the tokens that the policy wrote, divided by `tokens`.

    Args:
        surrogate (`torch.Tensor` of shape `()`):
            The clipped surrogate (eq. 7) as TRL computes it, with TRL's entropy bonus c₂ S if there is one.
        logps, values (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens and V of the states in which they were written, of policy and critic as
            they are.
        batch (`Mapping[str, torch.Tensor]`):
            `old_per_token_logps`, `old_values`, `returns`, `completion_mask` and, if environments wrote some tokens,
            `tool_mask`, of shape `(B, T)`. If there is a `positive_nll_coef`: `is_right` of shape `(B,)`, and
            `right_share` of shape `()`, the share of `tokens` that correct completions have.
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
    if policy_is_frozen:
        loss = (logps * 0.0).sum()  # the policy stays in the graph, on which all processes must agree
    else:
        loss = surrogate
        for name, weight in settings.weights.items():
            loss = loss + weight * (LOSS_TERMS[name](logps, batch) * mask).sum() / tokens
    loss = loss + settings.vf_coef * (by_value * mask).sum() / tokens
    log_ratio = (logps - old_logps).detach() * mask
    sums = {
        "tokens": mask,
        "value_loss": by_value * mask,
        "clipped_values": clipped * mask,
        "approximate_kl": 0.5 * log_ratio.square(),
        "ratio": log_ratio.exp() * mask,
        "old_kl": old_policy_kl(logps, batch) * mask,
    }
    return loss, {name: part.detach().float().sum() for name, part in sums.items()}
