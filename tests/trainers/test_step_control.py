"""Which optimizer steps move what: warm-up, steps of the critic alone, and steps whose loss isn't finite."""

from typing import Any

import pytest
import tiny
import torch
from trainers.test_ppo import build, lora, run

from trl_ext import NonFiniteLossError
from trl_ext.trainers.step_control import zero_loss


# Steps of the critic alone


@pytest.mark.train
@pytest.mark.parametrize(
    ("critic", "arguments"),
    [
        ({}, {}),
        ({"critic_trunk_grad": 0.5, "critic_head": "mlp"}, {}),
        ({"critic": "model"}, {}),
        ({}, {"peft_config": lora()}),
        ({"critic": "adapter"}, {"peft_config": lora()}),
    ],
    ids=["head", "shared", "model", "lora", "adapter"],
)
def test_the_policy_waits_for_its_critic(critic, arguments, tmp_path):
    # Two steps of warm-up; of two steps, the second moves the policy. AdamW would decay what has a gradient of zero.
    trainer = run(
        tmp_path,
        arguments=arguments,
        critic_warmup_steps=2,
        value_updates_per_policy_update=2,
        weight_decay=0.1,
        max_steps=6,
        entropy_coef=0.01,
        **critic,
    )
    assert trainer.weights.moved(critic=False) == [False, False, False, True, False, True]
    assert trainer.weights.moved(critic=True) == [True] * 6


WAITING = {"learning_rate": 0.05, "lr_scheduler_type": "linear", "optim": "sgd", "max_steps": 5}


@pytest.mark.train
def test_a_warm_up_that_ends_early_is_a_shorter_one(tmp_path):
    short = run(tmp_path / "short", critic_warmup_steps=1, **WAITING)
    settings = {"critic_warmup_steps": 4, "critic_warmup_explained_variance": -1e9}
    cut = run(tmp_path / "cut", **settings, **WAITING)
    assert cut.weights.moved(critic=False) == [False, True, True, True, True]
    for before, after in zip(short.weights.at, cut.weights.at, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert tiny.history(cut) == tiny.history(short)


@pytest.mark.train
def test_a_warm_up_ends_with_the_step_at_which_the_critic_is_good_enough(tmp_path, caplog):
    settings = {"critic_warmup_steps": 4, "critic_learning_rate": 0.5, **WAITING}
    whole = run(tmp_path / "whole", **settings)
    found = [log["val/explained_variance"] for log in tiny.history(whole)][:4]
    wanted = max(found[:3])
    begins = found.index(wanted) + 1
    assert 1 < begins < 4  # it is 0 before the first step
    cut = run(tmp_path / "cut", critic_warmup_explained_variance=wanted, **settings)
    assert cut.weights.moved(critic=False) == [step >= begins for step in range(5)]
    assert "begins to learn nevertheless" not in caplog.text
    never = run(tmp_path / "never", critic_warmup_explained_variance=0.999, **settings)
    assert "after critic_warmup_steps=4, below critic_warmup_explained_variance=0.999" in caplog.text
    assert all(torch.equal(value, never.weights.at[-1][name]) for name, value in whole.weights.at[-1].items())


@pytest.mark.train
def test_coefficients_wait_for_the_policy(tmp_path):
    """Before it moves, the KL is 0 by construction, whatever the coefficient is."""
    adaptive = {"kl_target": 0.1, "kl_rule": "exponential", "old_kl_coef": 0.5, "old_kl_target": 1e-3}
    trainer = run(tmp_path, critic_warmup_steps=2, **adaptive, **WAITING)
    logs = tiny.history(trainer)
    # Step 3 is the policy's first: what its batch and its end say counts from the next step on
    coefficients = [log["objective/kl_coef"] for log in logs]
    assert coefficients[:3] == [0.1] * 3 and coefficients[3] != 0.1
    assert ["policy/old_kl_coef" in log for log in logs] == [False, False, False, True, True]


# Losses that are not finite


def test_a_loss_that_is_not_finite_is_replaced_by_zero_in_the_same_graph():
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    logps, values = weight * torch.tensor([1.0, torch.inf]), weight * torch.tensor([torch.nan, 1.0])
    loss = zero_loss(logps, values)
    assert loss.item() == 0.0
    assert loss.requires_grad


class Explodes:
    """Rewards whose squares float32 can't hold, at some optimizer steps."""

    __name__ = "explodes"

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def __call__(self, completion_ids: Any, trainer_state: Any, **columns: Any) -> list[float]:
        factor = 1e30 if trainer_state.global_step in self.steps else 1.0
        return [factor * reward for reward in tiny.hashed(completion_ids)]


@pytest.mark.train
@pytest.mark.parametrize("settings", [{}, {"critic": "model"}, {"critic_warmup_steps": 3}], ids=str)
def test_a_step_whose_loss_is_not_finite_is_skipped(settings, tmp_path, caplog):
    trainer = run(tmp_path, Explodes(1, 3, 4), max_steps=6, weight_decay=0.1, kl_coef=0.0, **settings)
    moved = trainer.weights.moved(critic=True)
    assert moved == [True, False, True, False, False, True]
    assert trainer.weights.moved(critic=False)[1:5] == [False, not settings.get("critic_warmup_steps"), False, False]
    assert all(value.isfinite().all() for value in trainer.weights.at[-1].values())
    assert trainer.skipped_steps == 3
    assert [log.get("skipped_steps") for log in tiny.history(trainer)] == [None, 1, None, 2, 3, None]
    assert "The loss of step 2 is not finite: the step is skipped" in caplog.text


@pytest.mark.train
def test_one_broken_micro_batch_is_enough(tmp_path):
    # Of two micro-batches of the step, in one row only
    class ExplodesOnce:
        __name__ = "explodes_once"

        def __call__(self, completion_ids: Any, trainer_state: Any, **columns: Any) -> list[float]:
            rewards = tiny.hashed(completion_ids)
            if trainer_state.global_step == 1:
                rewards[0] = 1e30
            return rewards

    trainer = run(tmp_path, ExplodesOnce(), max_steps=3, whiten_advantages=False, kl_coef=0.0)
    assert trainer.weights.moved(critic=False) == trainer.weights.moved(critic=True) == [True, False, True]


@pytest.mark.train
def test_three_in_a_row_stop_the_run_with_a_checkpoint(tmp_path):
    trainer = build(tmp_path, Explodes(2, 3, 4), max_steps=9, kl_coef=0.0)
    with pytest.raises(NonFiniteLossError, match=r"not finite for 3 steps in a row\. Lower learning_rate") as error:
        trainer.train()
    assert trainer.state.global_step == 5
    assert "checkpoint-5" in "".join(error.value.__notes__)
    assert (tmp_path / "checkpoint-5" / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-5" / "critic" / "critic.safetensors").exists()
    mended = run(tmp_path, max_steps=6, kl_coef=0.0, arguments={})
    mended.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert mended.state.global_step == 6
