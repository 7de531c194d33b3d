"""KL estimators, by enumeration of a small distribution, and the rules for their coefficient, by hand."""

import math

import pytest
import torch

from trl_ext.objectives.kl import KL_ESTIMATORS, KL_RULES, adapted_kl_coef, kl_estimate


def distributions(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two distributions over 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, 7, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(dim=1)
    return p, q


def expectation(p: torch.Tensor, q: torch.Tensor, estimator: str) -> torch.Tensor:
    """Of an estimate on a token that p sampled: every token, with its probability."""
    return (p.exp() * kl_estimate(p, q, estimator)).sum()


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )


class TestEstimators:
    def test_by_hand(self):
        # p = 1/2, q = 1/8: log p/q = log 4, and q/p = 1/4
        p, q = torch.tensor([0.5]).log(), torch.tensor([0.125]).log()
        for estimator, expected in (
            ("k1", math.log(4)),
            ("k2", math.log(4) ** 2 / 2),
            ("k3", 1 / 4 - 1 + math.log(4)),
        ):
            torch.testing.assert_close(kl_estimate(p, q, estimator), torch.tensor([expected]))

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_k1_and_k3_are_unbiased(self, estimator, seed):
        p, q = distributions(seed)
        torch.testing.assert_close(expectation(p, q, estimator), divergence(p, q))
        # of KL(p‖q), not KL(q‖p): those differ
        assert (divergence(p, q) - divergence(q, p)).abs() > 1e-2

    def test_k2_is_biased_and_close_where_the_policies_are(self):
        # p = (0.9, 0.1), q = (0.1, 0.9): the KL is 0.8·log 9 = 1.758, and k2 is ½ (log 9)² = 2.414 for either token
        p, q = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        torch.testing.assert_close(divergence(p, q), torch.tensor(0.8 * math.log(9)))
        torch.testing.assert_close(expectation(p, q, "k2"), torch.tensor(math.log(9) ** 2 / 2))
        p, q = distributions()
        near = (p + 1e-3 * q).log_softmax(dim=0)
        assert (expectation(p, near, "k2") / divergence(p, near) - 1).abs() < 1e-2

    def test_k3_has_less_variance_than_k1_where_the_policies_are_close(self):
        p, q = distributions(spread=0.1)

        def variance(estimator: str) -> torch.Tensor:
            distance = kl_estimate(p, q, estimator) - divergence(p, q)
            return (p.exp() * distance.square()).sum()

        assert variance("k3") < variance("k1") / 5

    def test_k2_and_k3_are_never_negative_and_k1_is(self):
        p, q = distributions()
        assert (kl_estimate(p, q, "k2") >= 0).all()
        assert (kl_estimate(p, q, "k3") >= 0).all()
        assert (kl_estimate(p, q, "k1") < 0).any()

    @pytest.mark.parametrize("estimator", KL_ESTIMATORS)
    def test_equal_policies_have_none(self, estimator):
        p, _ = distributions()
        assert not kl_estimate(p, p, estimator).any()

    def test_a_tiny_difference_is_not_lost_to_rounding(self):
        # k3 = x²/2 − x³/6 + …; in float32, exp(−x) − 1 + x would be off by several percent
        estimate = kl_estimate(torch.tensor([0.0]), torch.tensor([-1e-3]), "k3").item()
        assert estimate == pytest.approx(1e-6 / 2 - 1e-9 / 6, rel=1e-3)

    def test_k3_on_tokens_of_the_old_policy_has_the_gradient_of_its_kl(self):
        # PPO's penalty: samples of π_old, gradient of KL(π_old‖π_θ) by π_θ, which is π_θ − π_old on the logits
        old, start = distributions()
        logits = start.clone().requires_grad_()
        new = logits.log_softmax(dim=0)
        (old.exp() * kl_estimate(old, new, "k3")).sum().backward()
        torch.testing.assert_close(logits.grad, start.exp() - old.exp())

    def test_an_unknown_estimator(self):
        with pytest.raises(ValueError, match=r"'k4' is unknown\. Choose one of 'k1', 'k2', 'k3'"):
            kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def adapted(kl: float, rule: str, coef: float = 0.1, target: float = 6.0, samples: int = 512) -> float:
    return adapted_kl_coef(coef, kl, target, rule, horizon=10_000, samples=samples, rate=0.2)


class TestRules:
    def test_ppo_by_hand(self):
        # Target 6: halved below 4, doubled above 9
        assert adapted(3.99, "ppo") == 0.05
        assert adapted(4.01, "ppo") == adapted(6.0, "ppo") == adapted(8.99, "ppo") == 0.1
        assert adapted(9.01, "ppo") == 0.2
        assert adapted(-3.0, "ppo") == 0.05

    def test_proportional_by_hand(self):
        # Error clip(kl/6 − 1, ±0.2), times 512/10,000 = 0.0512
        assert adapted(6.6, "proportional") == pytest.approx(0.1 * (1 + 0.1 * 0.0512))
        assert adapted(5.4, "proportional") == pytest.approx(0.1 * (1 - 0.1 * 0.0512))
        assert adapted(60.0, "proportional") == pytest.approx(0.1 * (1 + 0.2 * 0.0512))
        assert adapted(0.0, "proportional") == pytest.approx(0.1 * (1 - 0.2 * 0.0512))
        assert adapted(60.0, "proportional", samples=64) == pytest.approx(0.1 * (1 + 0.2 * 0.0064))

    def test_exponential_by_hand(self):
        assert adapted(8.0, "exponential") == pytest.approx(0.1 * math.exp(0.2 * 2))
        assert adapted(1.0, "exponential") == pytest.approx(0.1 * math.exp(-0.2 * 5))

    @pytest.mark.parametrize("rule", KL_RULES)
    def test_on_target_nothing_changes(self, rule):
        assert adapted(6.0, rule) == pytest.approx(0.1)

    @pytest.mark.parametrize("rule", [rule for rule in KL_RULES if rule != "fixed"])
    def test_too_far_away_punishes_more_and_too_close_less(self, rule):
        assert adapted(20.0, rule) > 0.1 > adapted(0.1, rule) > 0

    def test_fixed_stays(self):
        assert adapted(1e9, "fixed") == 0.1

    @pytest.mark.parametrize("rule", KL_RULES)
    @pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
    def test_a_kl_that_is_not_finite_changes_nothing(self, kl, rule):
        assert adapted(kl, rule) == 0.1

    def test_exponential_stays_finite(self):
        assert math.isfinite(adapted(1e9, "exponential"))

    def test_an_unknown_rule(self):
        with pytest.raises(ValueError, match="'newton' is unknown"):
            adapted(1.0, "newton")
