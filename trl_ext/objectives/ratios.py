"""
Importance ratios that the loss of TRL's GRPO doesn't have: GSPO-token's (https://huggingface.co/papers/2507.18071, eq.
13–14), and the ratio of a whole sequence, RLOO's. `IMPORTANCE_LEVELS` is the table of importance sampling levels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import require_one_of


def mean_log_ratio(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """
    log s_i of GSPO (eq. 7): the mean of logp − logp_old over the tokens of a completion.

    Args:
        per_token_logps, old_per_token_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities in nats under the policy, and under the policy that sampled the completions.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on the tokens that the policy wrote.

    Returns:
        `torch.Tensor` of shape `(B, 1)`: 0 for a completion without tokens.
    """
    log_ratio = ((per_token_logps - old_per_token_logps) * mask).sum(dim=1, keepdim=True)
    return log_ratio / mask.sum(dim=1, keepdim=True).clamp(min=1)


def sequence_token_old_logps(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """
    Old log-probabilities with which a token-level ratio becomes the ratio of GSPO-token.

    s_it = sg[s_i] · π_θ(o_it) / sg[π_θ(o_it)] (eq. 14) = exp(logp_it − (sg[logp_it] − sg[log s_i])). The returned
    values are the term in brackets: exp(logp − returned) has the value s_i and the gradient of a token ratio times
    s_i.

    Args:
        per_token_logps, old_per_token_logps, mask (`torch.Tensor` of shape `(B, T)`):
            See [`mean_log_ratio`].

    Returns:
        `torch.Tensor` of shape `(B, T)`, without gradient.
    """
    logps = per_token_logps.detach()
    return logps - mean_log_ratio(logps, old_per_token_logps, mask)


def sequence_product_old_logps(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """
    Old log-probabilities with which TRL's sequence ratio, a geometric mean, becomes the ratio of the whole sequence.

    r_i = π_θ(o_i)/π_old(o_i) = exp(L_i) with L_i = Σ_t (logp_it − logp_old_it). The returned values are logp_it − L_i:
    the mean over tokens of logp_it − returned_it is L_i in value and in gradient.

    Args:
        per_token_logps, old_per_token_logps, mask (`torch.Tensor` of shape `(B, T)`):
            See [`mean_log_ratio`].

    Returns:
        `torch.Tensor` of shape `(B, T)`, with the gradient of `per_token_logps`.
    """
    log_ratio = ((per_token_logps - old_per_token_logps) * mask).sum(dim=1, keepdim=True)
    return per_token_logps - log_ratio


# Sizes of a ratio: of one token, of a geometric mean over the tokens of a sequence, of their product
RATIO_SIZES = ("token", "sequence", "product")


@dataclass(frozen=True)
class ImportanceLevel:
    """
    An entry of `IMPORTANCE_LEVELS`: how TRL's loss computes the importance ratio.

    Args:
        of (`str`):
            `"token"`, `"sequence"` or `"product"`: the size of the ratio is that of a token's, of a geometric mean
            over the tokens of a sequence, or of their product, which decides about the clip ranges that make sense.
        trl_level (`str`):
            Value of TRL's `importance_sampling_level` with which TRL's loss is computed.
        old_logps (`Callable`, *optional*):
            From log-probabilities, old log-probabilities and mask, all `(B, T)`, to the old log-probabilities that
            TRL's loss gets. `None`: TRL's loss gets the old log-probabilities unchanged.

    Raises:
        ValueError: if `of` or `trl_level` is unknown.
    """

    of: str
    trl_level: str
    old_logps: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        require_one_of("of", self.of, RATIO_SIZES)
        require_one_of("trl_level", self.trl_level, ("token", "sequence"))


# A new level is an entry here and, if it needs one, a function above.
IMPORTANCE_LEVELS = {
    "token": ImportanceLevel(of="token", trl_level="token"),
    "sequence": ImportanceLevel(of="sequence", trl_level="sequence"),
    "sequence_token": ImportanceLevel(of="sequence", trl_level="token", old_logps=sequence_token_old_logps),
    "sequence_product": ImportanceLevel(of="product", trl_level="sequence", old_logps=sequence_product_old_logps),
}
