"""
DPPO's divergences and mask (https://huggingface.co/papers/2602.04879, eq. 12–14) in float64, against values by hand.
That TRL's loss with them is DPPO is tested on a real trainer, in tests/trainers/test_trust_region.py.
"""

import math

import pytest
import torch

from trl_ext.objectives.trust_region import TRUST_REGIONS, TrustRegion, binary_kl, binary_tv, inside


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def dppo(logps, sampling_logps, advantages, name, threshold):
    """Σ_t M_t r_t A_t (eq. 12)."""
    beyond = TRUST_REGIONS[name].divergence(logps.detach(), sampling_logps) > threshold
    kept = inside(logps.detach(), sampling_logps, advantages, beyond)
    return (kept * torch.exp(logps - sampling_logps) * advantages).sum()


def test_total_variation_by_hand():
    # The paper's examples: a rare token that becomes a hundred times as likely, and a likely one that loses 0.19
    found = binary_tv(logs(1e-3, 0.8, 0.5), logs(1e-5, 0.99, 0.5))
    torch.testing.assert_close(found, torch.tensor([[0.00099, 0.19, 0.0]], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_kl_by_hand():
    # μ = 1/2, π = 1/4: ½ log 2 + ½ log(½/¾) = ½ log 2 + ½ log ⅔ = ½ log 4/3.
    # μ = 1/4, π = 1/2: ¼ log ½ + ¾ log(¾/½) = ¾ log 3 − log 2.
    expected = [[0.5 * math.log(4 / 3), 0.75 * math.log(3) - math.log(2), 0.0]]
    found = binary_kl(logs(0.25, 0.5, 0.3), logs(0.5, 0.25, 0.3))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_kl_is_finite_where_a_probability_is_rounded_to_one():
    # In float32, a probability closer to 1 than 6e-8 is 1, and log(1 − p) is −∞
    certain, likely = torch.zeros(1, 1), torch.tensor([[0.9]]).log()
    assert binary_kl(certain, certain).item() == 0.0
    away, back = binary_kl(certain, likely).item(), binary_kl(likely, certain).item()
    assert 0.05 < away < math.inf and back == pytest.approx(-math.log(0.9), rel=1e-4)


# μ, π, A, whether the token is outside of TV 0.15 and moves further (M_t = 0)
TOKENS = [
    (0.5, 0.8, 2.0, True),  # A > 0, r > 1, TV 0.3
    (0.5, 0.6, 2.0, False),  # A > 0, r > 1, TV 0.1: inside
    (0.5, 0.2, 2.0, False),  # A > 0, r < 1, TV 0.3: leads back
    (0.5, 0.2, -3.0, True),  # A < 0, r < 1, TV 0.3
    (0.5, 0.4, -3.0, False),  # A < 0, r < 1, TV 0.1: inside
    (0.5, 0.8, -3.0, False),  # A < 0, r > 1, TV 0.3: leads back
    (0.01, 0.1, 2.0, False),  # ratio 10, TV 0.09: PPO would clip it
    (0.99, 0.8, -1.0, True),  # ratio 0.81, TV 0.19: PPO's 0.2 would not
    (0.5, 0.8, 0.0, False),  # nothing to learn
]


@pytest.mark.parametrize("name", ["binary_tv", "binary_kl"])
def test_value_and_gradient_by_hand(name):
    # Of M r A the value is M·π/μ·A, and so is the gradient on log π, because dr/dlog π = r
    mu, pi, advantage, outside = zip(*TOKENS, strict=True)
    threshold = 0.15
    if name == "binary_kl":  # by the definition, token by token; other tokens are outside than with TV
        kl = [m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p)) for m, p in zip(mu, pi, strict=True)]
        threshold = 0.05
        leads_away = [(a > 0 and p > m) or (a < 0 and p < m) for m, p, a, _ in TOKENS]
        outside = [d > threshold and away for d, away in zip(kl, leads_away, strict=True)]
        assert outside[6] and not outside[4]  # 0.01 to 0.1 is 0.064 nats
    expected = [0.0 if out else p / m * a for m, p, a, out in zip(mu, pi, advantage, outside, strict=True)]
    logps = logs(*pi).requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    objective = dppo(logps, logs(*mu), advantages, name, threshold)
    assert objective.item() == pytest.approx(sum(expected), rel=1e-12)
    (gradient,) = torch.autograd.grad(objective, logps)
    torch.testing.assert_close(gradient, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_one_advantage_for_a_completion():
    kept = inside(logs(0.8, 0.2), logs(0.5, 0.5), torch.tensor([[1.0]]), torch.tensor([[True, True]]))
    assert kept.tolist() == [[0.0, 1.0]]


def test_entries():
    assert {name: entry.threshold for name, entry in TRUST_REGIONS.items()} == {
        **{"ratio_clip": None, "binary_tv": 0.15, "binary_kl": 0.05}
    }
    with pytest.raises(ValueError, match="half written"):
        TrustRegion(binary_tv)
    with pytest.raises(ValueError, match="half written"):
        TrustRegion(threshold=0.1)
