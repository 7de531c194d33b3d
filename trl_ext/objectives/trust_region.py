"""
How far an update may take the policy from the one that sampled. `TRUST_REGIONS` is the table of trust regions.

PPO bounds the ratio of a token by clipping, which TRL's loss does. DPPO (https://huggingface.co/papers/2602.04879)
bounds a divergence: the ratio of a rare token may be large while the policy has hardly changed, and that of a likely
one is near 1 while it has changed a lot. The objective is Σ_t M_t r_t A_t (eq. 12), without a clip, with M_t = 0 on
tokens that are outside of the region and would leave it further, and 1 elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import require
from .papers import DPPO


Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def binary_tv(logps: torch.Tensor, sampling_logps: torch.Tensor) -> torch.Tensor:
    """
    |μ(a) − π(a)| (eq. 13): the total variation between the policy π and the policy μ that sampled, where only the
    sampled token and the rest of the vocabulary are told apart.

    Args:
        logps, sampling_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens in nats under π and μ.

    Returns:
        `torch.Tensor` of shape `(B, T)`: in [0, 1].
    """
    return (logps.exp() - sampling_logps.exp()).abs()


def binary_kl(logps: torch.Tensor, sampling_logps: torch.Tensor) -> torch.Tensor:
    """
    μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π)) (eq. 14): KL(μ‖π) where only the sampled token and the rest of the
    vocabulary are told apart.

    Args:
        logps, sampling_logps (`torch.Tensor` of shape `(B, T)`):
            See [`binary_tv`].

    Returns:
        `torch.Tensor` of shape `(B, T)`: in nats, not negative but for rounding.
    """
    mu = sampling_logps.exp()
    return mu * (sampling_logps - logps) + (1 - mu) * (_log_of_rest(sampling_logps) - _log_of_rest(logps))


def _log_of_rest(logps: torch.Tensor) -> torch.Tensor:
    """log(1 − p). A probability that is rounded to 1 is taken for the largest below 1."""
    return torch.log(-torch.expm1(logps.clamp(max=-torch.finfo(logps.dtype).eps)))


def inside(
    logps: torch.Tensor, sampling_logps: torch.Tensor, advantages: torch.Tensor, beyond: torch.Tensor
) -> torch.Tensor:
    """
    M_t of DPPO (eq. 12): which tokens move the policy.

    A token is dropped where the divergence is too large and the update would make it larger: where π/μ > 1 and the
    advantage is positive, or π/μ < 1 and it is negative. An update that leads back is never dropped.

    Args:
        logps, sampling_logps (`torch.Tensor` of shape `(B, T)`):
            See [`binary_tv`].
        advantages (`torch.Tensor` of shape `(B, T)` or `(B, 1)`):
            Advantages of the tokens.
        beyond (`torch.Tensor` of shape `(B, T)`):
            Whether the divergence is above its threshold.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 1 on tokens that move the policy, 0 on those that are dropped.
    """
    leads_away = advantages.sign() * (logps - sampling_logps) > 0
    return (~(leads_away & beyond)).to(logps)


@dataclass(frozen=True)
class TrustRegion:
    """
    An entry of `TRUST_REGIONS`.

    Args:
        divergence (`Callable`, *optional*):
            From log-probabilities of the tokens under the policy and under the one that sampled, both `(B, T)`, to
            their divergence `(B, T)`. `None`: TRL's loss clips the ratio.
        threshold (`float`, *optional*):
            Largest divergence inside, if the user doesn't set it.
        largest (`float`, *optional*):
            Bound of the divergence: a threshold as large as that bounds nothing. `None`: it has none.
        paper (`Mapping[str, str]`, *optional*):
            Where it comes from.

    Raises:
        ValueError: if there is a divergence without a threshold, or the reverse.
    """

    divergence: Divergence | None = None
    threshold: float | None = None
    largest: float | None = None
    paper: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        require(
            (self.divergence is None) == (self.threshold is None),
            f"A trust region with divergence={self.divergence!r} and threshold={self.threshold!r} is half written: "
            "give it both, or none of them.",
        )


# A new trust region is a function above and an entry here. The thresholds are those of the paper's appendix C.
TRUST_REGIONS = {
    "ratio_clip": TrustRegion(),
    "binary_tv": TrustRegion(binary_tv, threshold=0.15, largest=1.0, paper=DPPO),
    "binary_kl": TrustRegion(binary_kl, threshold=0.05, paper=DPPO),
}
