"""
VAPO (https://huggingface.co/papers/2504.05118): value pretraining against values derived by hand, and each of its
switches, alone and together. Its λ, returns and negative log-likelihood by hand are in `tests/objectives`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from trainers import test_ppo
from trainers.test_ppo import lora

from trl_ext import GRPOConfig, PPOConfig, VAPOConfig, VAPOTrainer


def build(tmp_path: Any, reward: Any = tiny.hashed, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    """16 completions of 4 prompts a generation batch, one optimizer step on each."""
    settings = {"num_generations": 4, "critic_warmup_steps": 0, **settings}
    return tiny.trainer(tiny.recorded(VAPOTrainer), tmp_path, reward, arguments, **settings)


run = partial(test_ppo.run, build=build)


def test_the_defaults_are_the_papers(tmp_path):
    config = VAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert config.critic_warmup_steps == 50 and config.critic_warmup_explained_variance is None
    assert (config.gamma, config.critic_lam, config.lam_alpha) == (1.0, 1.0, 0.05)
    assert (config.epsilon, config.epsilon_high) == (0.2, 0.28)
    assert (config.loss_type, config.token_normalization) == ("dapo", "mini_batch")
    assert config.positive_nll_coef == 0.1
    assert (config.num_generations, config.num_iterations) == (16, 1)
    assert (config.critic, config.learning_rate, config.critic_learning_rate) == ("model", 1e-6, 2e-6)
    assert (config.kl_coef, config.beta, config.cliprange_value) == (0.0, 0.0, None)
    # 512 prompts of 16 completions in mini-batches of 512
    assert config.steps_per_generation == 16 * config.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("settings", "rate"),
    [({"learning_rate": 1e-4}, 2e-4), ({"critic": "head"}, 2e-4), ({"critic_learning_rate": 0.5}, 0.5)],
)
def test_the_critic_learns_twice_as_fast_as_in_ppo(settings, rate, tmp_path):
    config = VAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert config.critic_learning_rate == pytest.approx(rate)
    assert config.with_critic("model").critic_learning_rate == pytest.approx(
        rate if "critic" not in settings else 2e-6
    )


def test_a_configuration_of_ppo_is_none_of_vapo(tmp_path):
    """Nobody could tell which of PPO's defaults were meant."""
    ppo = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, critic_lam=0.5)
    with pytest.raises(TypeError, match="`args` is a PPOConfig, whose defaults are those of a different method"):
        VAPOConfig.adopt(ppo)
    plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=8)
    taken = VAPOConfig.adopt(plain)
    assert (taken.num_generations, taken.lam_alpha, taken.epsilon_high) == (8, 0.05, 0.28)


@pytest.mark.train
@pytest.mark.parametrize(
    "axis",
    [
        {"rollout_selection": "refill"},
        {"rollout_selection": "duplicate"},
        {"importance_sampling_level": "sequence_token", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"trust_region": "binary_tv"},
    ],
    ids=lambda axis: next(iter(axis.values())),
)
def test_it_goes_with_the_axes(axis, tmp_path):
    trainer = run(tmp_path, critic_warmup_steps=1, lam_alpha=0.4, max_steps=2, **axis)
    assert trainer.weights.moved(critic=False) == [False, True]
    assert all(value.isfinite().all() for value in trainer.weights.at[-1].values())


# Value pretraining


PRETRAINING = {
    "critic_warmup_steps": 2,
    "critic": "head",
    "gamma": 0.5,
    "critic_lam": 0.6,
    "lam_alpha": 0.4,
    "vf_coef": 0.7,
    "optim": "sgd",
    "learning_rate": 0.1,
    "critic_learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 4,
}


def rows_of_step(trainer: Any, step: int) -> Iterator[tuple[list[int], list[int], list[float], list[float]]]:
    """Of each row of an optimizer step: ids of its prompt and of its completion, and its returns and old values."""
    per_step = len(trainer.losses) // trainer.state.max_steps
    for inputs in trainer.losses[step * per_step : (step + 1) * per_step]:
        lengths, prompts = inputs["completion_mask"].sum(dim=1).tolist(), inputs["prompt_mask"].sum(dim=1).tolist()
        for row, (n, m) in enumerate(zip(lengths, prompts, strict=True)):
            ids = inputs["completion_ids"][row, :n].tolist()
            returns, values = (inputs[name][row, :n].double().tolist() for name in ("returns", "old_values"))
            yield inputs["prompt_ids"][row].tolist()[-m:], ids, returns, values


@pytest.mark.train
def test_pretraining_by_hand(tmp_path):
    """
    The reward R of a completion of T tokens is at its end, so that the Monte-Carlo return of token t is γ^(T−1−t)·R,
    whatever λ the rest of the run has. With a linear head, V = w·h + b of the hidden state h in which the token was
    written; w and b are 0 at first. The loss is 0.7 · ½ (V − return)², a mean over the tokens of the step, so that a
    step of gradient descent adds 0.1 · 0.7 · mean of (return − V)·h to w, and the same without h to b.
    """
    start = tiny.stopping().double()
    trainer = run(tmp_path, arguments={"model": tiny.stopping()}, **PRETRAINING)
    assert trainer.weights.moved(critic=False) == [False, False, True, True]
    assert trainer.weights.moved(critic=True) == [True] * 4
    weight, bias = torch.zeros(start.config.hidden_size, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for step in (0, 1):
        states, targets = [], []
        for prompt, ids, returns, _ in rows_of_step(trainer, step):
            (reward,) = tiny.hashed([ids])
            expected = [0.5 ** (len(ids) - 1 - t) * reward for t in range(len(ids))]
            assert returns == pytest.approx(expected, rel=1e-5)
            with torch.no_grad():
                hidden = start.base_model(torch.tensor([prompt + ids])).last_hidden_state[0]
            states.append(hidden[len(prompt) - 1 : -1])
            targets += expected
        hidden, target = torch.cat(states), torch.tensor(targets, dtype=torch.float64)
        missing = target - (hidden @ weight + bias)
        weight = weight + 0.1 * 0.7 * (missing.unsqueeze(1) * hidden).mean(dim=0)
        bias = bias + 0.1 * 0.7 * missing.mean()
        found = trainer.weights.at[step + 1]
        (name,) = [name for name in found if name.endswith("critic.head.out.weight")]
        torch.testing.assert_close(found[name][0].double(), weight, rtol=1e-4, atol=1e-7)
        assert float(found[name.replace("weight", "bias")]) == pytest.approx(float(bias), rel=1e-4)


@pytest.mark.train
def test_after_pretraining_returns_have_their_own_lambda(tmp_path):
    """return_t = V_t + Σ_l (γλ)^l δ_{t+l}, with δ_t = r_t + γV_{t+1} − V_t, γ = 0.5 and λ = 0.6."""
    trainer = run(tmp_path, **PRETRAINING)
    for step in range(4):
        differ = 0.0
        for _, ids, returns, values in rows_of_step(trainer, step):
            rewards = [0.0] * (len(ids) - 1) + tiny.hashed([ids])
            deltas = [r + 0.5 * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
            sums = [sum(0.3**i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(ids))]
            by_lambda = [value + a for value, a in zip(values, sums, strict=True)]
            if step >= 2:
                assert returns == pytest.approx(by_lambda, rel=1e-4, abs=1e-6)
            differ = max([differ, *(abs(one - other) for one, other in zip(returns, by_lambda, strict=True))])
        assert (differ > 1e-3) == (step < 2)


@pytest.mark.train
def test_pretraining_is_logged(tmp_path):
    trainer = run(tmp_path, **PRETRAINING)
    assert [log["val/warmup"] for log in tiny.history(trainer)] == [1.0, 1.0, 0.0, 0.0]
    assert all("val/explained_variance" in log and "loss/value_avg" in log for log in tiny.history(trainer))
    without = run(tmp_path / "without", **PRETRAINING | {"critic_warmup_steps": 0})
    assert not any("val/warmup" in log for log in tiny.history(without))


@pytest.mark.train
@pytest.mark.parametrize(
    ("settings", "arguments"),
    [({}, {}), ({"critic": "head", "critic_trunk_grad": 0.5}, {}), ({}, {"peft_config": lora()})],
    ids=["model", "shared", "lora"],
)
def test_the_policy_that_is_sampled_is_fixed(settings, arguments, tmp_path):
    """Its log-probabilities of what it sampled are the same at the end of the pretraining as when it sampled."""
    trainer = run(tmp_path, arguments=arguments, critic_warmup_steps=3, max_steps=5, learning_rate=0.05, **settings)
    assert trainer.weights.moved(critic=False) == [False] * 3 + [True] * 2
    assert trainer.weights.moved(critic=True) == [True] * 5
    # A learning rate of 0 alone would leave the policy where it is, but fill Adam's averages
    for group in trainer.optimizer.param_groups:
        taken = {int(trainer.optimizer.state[parameter]["step"]) for parameter in group["params"]}
        assert taken == {5 if group.get("is_critic") else 2}
    # The surrogate at ratio 1 is minus the mean advantage, which whitening makes 0; no other term is in the loss
    for log in tiny.history(trainer)[:3]:
        assert log["loss"] == pytest.approx(0.1 * log["loss/value_avg"], rel=1e-4, abs=1e-6)


# Switches


# A narrow clip range, which this policy leaves within a generation batch, and an upper end that it doesn't reach
COMMON = {
    "epsilon": 0.01,
    "success_threshold": 0.5,
    "updates_per_generation": 2,
    "per_device_train_batch_size": 8,
    "max_steps": 4,
    "learning_rate": 0.5,
    "critic_learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
# Each on, and off, which is PPO
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "value pretraining": ({"critic_warmup_steps": 1}, {"critic_warmup_steps": 0}),
    "decoupled GAE": ({"critic_lam": 1.0}, {"critic_lam": None}),
    "length-adaptive GAE": ({"lam_alpha": 0.4}, {"lam_alpha": None}),
    "clip-higher": ({"epsilon_high": 1.0}, {"epsilon_high": None}),
    "token-level loss": ({"loss_type": "dapo"}, {"loss_type": "grpo"}),
    "positive examples": ({"positive_nll_coef": 0.1}, {"positive_nll_coef": 0.0}),
    "groups": ({"num_generations": 4}, {"num_generations": 1}),
}


def end_of(tmp_path: Any, on: set[str]) -> torch.Tensor:
    """All weights at the end of a run with these switches on and the others off."""
    settings = dict(COMMON)
    for name, (when_on, when_off) in SWITCHES.items():
        settings |= when_on if name in on else when_off
    return torch.cat([weight.flatten() for weight in run(tmp_path, **settings).weights.at[-1].values()])


@pytest.fixture(scope="module")
def vapo(tmp_path_factory):
    return end_of(tmp_path_factory.mktemp("vapo"), set(SWITCHES))


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    return end_of(tmp_path_factory.mktemp("ppo"), set())


@pytest.mark.train
@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_alone_and_with_all_others(name, ppo, vapo, tmp_path):
    """What a step with them is, exactly, `test_ppo_loss.py` compares; here, that none of them is without effect."""
    alone, left_out = end_of(tmp_path / "alone", {name}), end_of(tmp_path / "left_out", set(SWITCHES) - {name})
    for one, other in ((alone, ppo), (left_out, vapo)):
        assert one.isfinite().all()
        assert (one - other).norm() > 1e-5 * other.norm()


def test_the_card_cites_the_paper(tmp_path):
    trainer = build(tmp_path)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "https://huggingface.co/papers/2504.05118" in card and "@article{yue2025vapo" in card
    assert "- vapo" in card
