"""A critic is fitted to completions whose rewards are known."""

import pytest
import tiny
import torch

import trl_ext
from trl_ext.trainers.value_fitting import ScoredCompletion, fit_values


def ppo(folder, **settings):
    return trl_ext.PPOTrainer(
        tiny.qwen2(),
        tiny.low_ids,
        args=trl_ext.PPOConfig(**tiny.cpu_settings(folder, critic_learning_rate=0.02, **settings)),
        train_dataset=tiny.prompts(8),
        processing_class=tiny.tokenizer(),
    )


def completions(count=24):
    """The reward is known from the first token of the completion."""
    return [ScoredCompletion([3, 4, 5], [8 + i % 2, 6, 7][: 1 + i % 3], 2.0 * (i % 2)) for i in range(count)]


@pytest.mark.train
def test_values_come_near_returns_and_nothing_else_moves(tmp_path):
    trainer = ppo(tmp_path, critic_head="mlp", critic_trunk_grad=1.0, gamma=0.5)
    before, random_state = tiny.weights(trainer.model), torch.get_rng_state()
    trainer.model.train()
    found = fit_values(trainer, completions(), epochs=40, seed=1)
    after = tiny.weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("critic.") for name in moved)
    assert torch.equal(torch.get_rng_state(), random_state) and trainer.model.training
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert found["completions"] == 24 and found["explained_variance"] > 0.5
    # Each of these states has one return: γ^2·2 after the prompt is a mean, γ·2 and 2 after the token that says so
    ids = torch.tensor([[3, 4, 5, 9, 6, 7], [3, 4, 5, 8, 6, 7]])
    from trl_ext.roles.critic import logps_and_values

    with torch.no_grad():
        values = logps_and_values(trainer.model.eval(), ids, torch.ones_like(ids))[1]
    assert values[0, 4] > 1.5 and abs(float(values[1, 4])) < 0.5
