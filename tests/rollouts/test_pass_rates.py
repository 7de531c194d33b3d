"""A regression of pass rates that learns online: against a slow twin, and on simulated prompts."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from trl_ext.rollouts.pass_rates import PRIOR_SPREAD, LogisticPosterior, PassRateModel, sigmoid


def groups(count: int, weights: list[float], seed: int, size: int = 8, spread: float = 0.0):
    """Features, passes and completions of prompts whose log-odds are linear in the features, up to a normal spread."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, len(weights)))
    p = sigmoid(x @ np.array(weights) + spread * generator.normal(size=count))
    return x, generator.binomial(size, p).astype(float), np.full(count, float(size))


def test_the_posterior_is_where_a_slow_search_finds_it():
    x, passes, tried = groups(40, [3.0, -1.0, 0.0], seed=0)
    prior = np.diag([1.0, 0.5, 2.0])
    posterior = LogisticPosterior(np.zeros(3), prior, memory=1.0)
    posterior.observe(x, passes, tried)

    def loss(w):
        z = x @ w
        return w @ prior @ w / 2 + (tried * np.logaddexp(0, z) - passes * z).sum()

    found = minimize(loss, np.zeros(3), tol=1e-12).x
    assert posterior.state_dict()["mean"].numpy() == pytest.approx(found, abs=1e-4)
    p = sigmoid(x @ found)
    curvature = prior + sum(n * q * (1 - q) * np.outer(row, row) for row, q, n in zip(x, p, tried, strict=True))
    assert posterior.state_dict()["precision"].numpy() == pytest.approx(curvature, rel=1e-3)


def test_rates_are_means_over_the_posterior():
    posterior = LogisticPosterior(np.array([2.0]), np.array([[0.25]]), memory=1.0)
    drawn = sigmoid(np.random.default_rng(0).normal(2.0, 2.0, size=200_000)).mean()
    assert posterior.rates(np.ones((1, 1)))[0] == pytest.approx(drawn, abs=0.01)


def test_what_was_learned_fades_to_the_prior():
    model = PassRateModel(2, plain=1, memory=0.5)
    x, passes, tried = groups(50, [2.0, 0.0], seed=1)
    model.observe(x, passes, tried)
    far = np.array([[2.0, 0.0]])
    path = [float(model.rates(far)[0])]
    for _ in range(30):
        model.tick()
        path.append(float(model.rates(far)[0]))
    assert path[0] > 0.9 and path == sorted(path, reverse=True)
    assert path[-1] == pytest.approx(0.5, abs=1e-3)
    assert model.correlation == pytest.approx(1 / 3, abs=0.05)  # the uniform distribution's


def test_plain_features_have_the_wider_prior():
    model = PassRateModel(5, plain=1, memory=1.0)
    precision = model.state_dict()["weights"]["precision"].numpy()
    assert precision == pytest.approx(np.diag([1.0, 1.0, 4.0, 4.0, 4.0, 4.0]) / PRIOR_SPREAD**2)


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (0.2, 0.3)])
def test_finds_how_alike_completions_are(a, b):
    """Features that say nothing: then ρ is that of the Beta distribution of the pass rates, 1 / (a + b + 1)."""
    generator = np.random.default_rng(2)
    model = PassRateModel(3, plain=1, memory=0.99)
    for _ in range(60):
        p = generator.beta(a, b, size=50)
        model.tick()
        model.observe(generator.normal(size=(50, 3)), generator.binomial(8, p).astype(float), np.full(50, 8.0))
    assert model.correlation == pytest.approx(1 / (a + b + 1), abs=0.06)
    assert model.rates(np.zeros((1, 3)))[0] == pytest.approx(a / (a + b), abs=0.06)


def test_single_completions_tell_rates_and_not_how_alike_they_are():
    generator, model = np.random.default_rng(3), PassRateModel(1, plain=1, memory=0.99)
    correlation = model.correlation
    for _ in range(40):
        x = generator.normal(size=(50, 1))
        p = sigmoid(3 * x[:, 0])
        model.observe(x, (generator.random(50) < p).astype(float), np.ones(50))
    assert model.correlation == correlation
    found, true = model.rates(np.array([[-0.5], [0.0], [0.5]])), sigmoid(np.array([-1.5, 0.0, 1.5]))
    assert found == pytest.approx(true, abs=0.06)


def test_tells_new_prompts_apart_and_follows_a_policy_that_improves():
    model, errors = PassRateModel(8, plain=1, memory=0.8), []
    for batch in range(40):
        x, _, tried = groups(32, [0.0] * 8, seed=batch)
        p = sigmoid(2 * x[:, 0] + x[:, 3] - 3 + 6 * batch / 40)
        errors.append(float(np.abs(model.rates(x) - p).mean()))
        model.tick()
        model.observe(x, np.random.default_rng(batch).binomial(8, p).astype(float), tried)
    assert errors[0] > 0.3
    assert np.mean(errors[10:]) < 0.12


def test_goes_on_where_it_was():
    whole = PassRateModel(3, plain=1, memory=0.9)
    whole.observe(*groups(20, [1.0, 0.0, 0.0], seed=3))
    kept = whole.state_dict()
    copied = PassRateModel(3, plain=1, memory=0.9)
    before = kept["weights"]["mean"].clone()
    for model in (whole, copied):
        if model is copied:
            assert torch.equal(kept["weights"]["mean"], before)
            copied.load_state_dict(kept)
        model.tick()
        model.observe(*groups(20, [1.0, 0.0, 0.0], seed=4))
    assert all(
        torch.equal(whole.state_dict()["weights"][name], copied.state_dict()["weights"][name])
        for name in ("mean", "precision")
    )
    assert whole.correlation == copied.correlation
