"""The policy's learning rate begins when the policy does; the critic's is that of the whole run."""

import pytest
import tiny
import torch
from torch.optim.lr_scheduler import LambdaLR
from trainers.test_ppo import run
from transformers import TrainingArguments, get_scheduler

from trl_ext.trainers.policy_schedule import check_warmup, with_policy_waiting


STEPS = 10


def rates(tmp_path, waits, **settings):
    """By step, of the policy and of the critic, whose base rates are 1 and 2. `waits` gives the warm-up by step."""
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1.0, use_cpu=True, **settings)
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 2.0, "is_critic": True}]
    optimizer, step = torch.optim.SGD(groups, lr=1.0), 0
    warmup = args.get_warmup_steps(STEPS)
    plain = get_scheduler(args.lr_scheduler_type, optimizer, warmup, STEPS, args.lr_scheduler_kwargs)
    scheduler = with_policy_waiting(plain, args, STEPS, lambda: waits(step))
    found = []
    for step in range(STEPS):  # noqa: B007 -- read by the schedule
        found.append(tuple(group["lr"] for group in optimizer.param_groups))
        assert scheduler.get_last_lr() == list(found[-1])
        optimizer.step()
        scheduler.step()
    policy, critic = zip(*found, strict=True)
    return list(policy), list(critic)


@pytest.mark.train
def test_a_decay_is_over_the_steps_that_are_left(tmp_path):
    policy, critic = rates(tmp_path, lambda step: 4, lr_scheduler_type="linear")
    assert policy == pytest.approx([0, 0, 0, 0, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert critic == pytest.approx([2 * (1 - step / 10) for step in range(10)])


@pytest.mark.train
def test_a_warm_up_of_the_rate_is_not_used_up(tmp_path):
    policy, critic = rates(tmp_path, lambda step: 3, lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    assert policy == pytest.approx([0, 0, 0, 0, 0.5, 1, 1, 1, 1, 1])
    assert critic == pytest.approx([0, 1, 2, 2, 2, 2, 2, 2, 2, 2])


@pytest.mark.train
def test_a_warm_up_that_is_a_share_is_one_of_the_steps_that_are_left(tmp_path):
    policy, _ = rates(tmp_path, lambda step: 2, lr_scheduler_type="constant_with_warmup", warmup_steps=0.5)
    assert policy == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


@pytest.mark.train
def test_a_wait_that_ends_early(tmp_path):
    """Known within step 1: the policy begins with step 2."""
    policy, _ = rates(tmp_path, lambda step: 2 if step >= 1 else 6, lr_scheduler_type="linear")
    assert policy == pytest.approx([0, 0, *(1 - step / 8 for step in range(8))])


@pytest.mark.train
def test_a_schedule_with_a_least_rate(tmp_path):
    settings = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.5}}
    policy, _ = rates(tmp_path, lambda step: 4, **settings)
    assert policy[:5] == [0, 0, 0, 0, 1] and policy[7] == pytest.approx(0.75) and policy[9] > 0.5


def test_a_schedules_state_holds_no_function(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = with_policy_waiting(LambdaLR(optimizer, lambda step: 1.0), args, STEPS, lambda: 2)
    assert made.state_dict()["lr_lambdas"] == [None]


def test_what_leaves_the_policy_nothing():
    check_warmup(0, 0)
    check_warmup(2, 3)
    with pytest.raises(ValueError, match="critic_warmup_steps=3 leaves none of the 3 optimizer steps to the policy"):
        check_warmup(3, 3)


@pytest.mark.train
def test_in_training(tmp_path):
    settings = {"critic_warmup_steps": 2, "max_steps": 6, "lr_scheduler_type": "linear", "learning_rate": 1.0}
    trainer = run(tmp_path, critic_learning_rate=0.5, optim="sgd", **settings)
    logged = [log["learning_rate"] for log in tiny.history(trainer)]
    assert logged == pytest.approx([0, 0, 1, 0.75, 0.5, 0.25])
    assert [group["lr"] for group in trainer.optimizer.param_groups if group.get("is_critic")] == [0.0, 0.0]


def test_epochs_that_leave_the_policy_nothing(tmp_path):
    settings = {"critic_warmup_steps": 4, "max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ValueError, match="leaves none of the 4 optimizer steps to the policy"):
        run(tmp_path, **settings)
