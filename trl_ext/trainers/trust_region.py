"""
A trust region in place of the clip of TRL's loss (DPPO, https://huggingface.co/papers/2602.04879).

TRL's loss has the rest: with an infinite clip range it is −r_t A_t, and here the advantages of dropped tokens are set
to 0 after its pass (M_t of eq. 12). Its other terms and what it divides by stay: dropped tokens are counted.

μ is the policy that sampled. If TRL has the log-probabilities of the engine that generated, it is the engine's (the
paper's section 5.2: a region around recomputed log-probabilities lets the two drift apart). The ratio is π/μ, too: TRL
takes π/π_old and multiplies by its correction π_old/μ; without that correction, μ takes the place of π_old.
"""

from typing import Any

import torch

from ..metric_keys import DIVERGENCE, DROPPED_TOKENS
from ..objectives.trust_region import inside
from .seams.critic import metrics_of


def _sampling_logps(logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities `(B, T)` under μ."""
    old = inputs.get("old_per_token_logps")
    if old is None:  # TRL leaves them out if the policy has not changed since it sampled
        old = logps
    of_engine = inputs.get("sampling_per_token_logps")
    # NaN: the engine could not score the token
    return old if of_engine is None else torch.where(of_engine.isnan(), old, of_engine)


def old_logps_with_region(logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Old log-probabilities `(B, T)` for TRL's ratio. `None`: those in `inputs` are used."""
    return None if "importance_sampling_ratio" in inputs else _sampling_logps(logps, inputs)


def confined_advantages(trainer: Any, logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """
    The advantages in `inputs`, 0 on tokens that are dropped. Logs how many are, and the divergence. Must be called on
    every process.

    Args:
        trainer ([`~trl_ext.GRPOTrainer`]):
            With a `trust_region` that has a divergence.
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens under the policy, without gradient.
        inputs (`dict`):
            What TRL's loss reads.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on the tokens that the policy wrote.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    advantages, sampling_logps = inputs["advantages"], _sampling_logps(logps, inputs)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    divergence = trainer.trust_region.divergence(logps, sampling_logps)
    kept = inside(logps, sampling_logps, advantages, divergence > trainer.args.trust_region_threshold)
    sums = torch.stack([((1 - kept) * mask).sum(), (divergence * mask).sum(), mask.sum()])
    dropped, total, tokens = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    metrics = metrics_of(trainer, trainer.model.training)
    metrics[DROPPED_TOKENS].append(dropped / max(tokens, 1.0))
    metrics[DIVERGENCE].append(total / max(tokens, 1.0))
    return advantages * kept
