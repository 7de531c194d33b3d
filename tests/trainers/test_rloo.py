"""Leave-one-out against TRL's `RLOOTrainer`, and REINFORCE against its formula, from the same rollouts."""

from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, relative_error

import trl_ext


ROWS, GROUP, LONGEST = 16, 4, 6


def run(trainer_class: Any, config_class: Any, tmp_path: Any, **settings: Any) -> tuple[Any, torch.Tensor]:
    """One step on 4 prompts × 4 completions in two micro-batches: the rollouts' reward function, and the gradient."""
    reward, gradients = tiny.Remembering(tiny.hashed), Gradients()
    base = tiny.cpu_settings(
        tmp_path,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        num_generations=GROUP,
        per_device_train_batch_size=ROWS // 2,
        max_completion_length=LONGEST,
        beta=0.0,
    )
    trainer = trainer_class(
        model=tiny.stopping(),
        reward_funcs=reward,
        args=config_class(**{**base, **settings}),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    (call,), (gradient,) = reward.calls, gradients.vectors
    return call, gradient


def score_gradients(call: Any) -> torch.Tensor:
    """∇ Σ_t log π(o_t) of each completion, `(N, parameters)`."""
    model, tokenizer = tiny.stopping(), tiny.tokenizer()
    rows = []
    for prompt, ids in zip(call.prompts, call.completion_ids, strict=True):
        start = tokenizer(prompt)["input_ids"]
        logits = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        logp = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, list(model.parameters()))]))
    return torch.stack(rows)


@pytest.mark.train
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_leave_one_out_is_trls_rloo(loss_type, tmp_path):
    """
    TRL's loss is a mean over completions of −min(r A, clip(r) A) with the ratio r of a whole completion. Before the
    first update r = 1, so that its gradient is −1/N Σ_i A_i ∇ Σ_t log π(o_it). Ours has the same sum, over the tokens
    of the batch in place of the N completions ("dapo"), or over N · max_completion_length ("dr_grpo"): TRL's is ours
    times the mean length, or times max_completion_length.
    """
    theirs, rloo = run(trl.RLOOTrainer, trl.RLOOConfig, tmp_path / "theirs")
    call, ours = run(
        trl_ext.GRPOTrainer,
        trl_ext.GRPOConfig,
        tmp_path / "ours",
        advantage_estimator="leave_one_out",
        loss_type=loss_type,
    )
    assert call.completion_ids == theirs.completion_ids and call.prompts == theirs.prompts
    mean_length = sum(map(len, call.completion_ids)) / ROWS
    assert mean_length < LONGEST
    factor = mean_length if loss_type == "dapo" else LONGEST
    assert relative_error(factor * ours, rloo) <= 1e-5
    # and both are what the formula says
    rewards = torch.tensor(call.rewards).view(-1, GROUP)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (GROUP - 1)
    formula = -((rewards - others).flatten().unsqueeze(1) * score_gradients(call)).sum(dim=0) / ROWS
    assert relative_error(rloo, formula) <= 1e-5


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_reinforce_is_its_formula(momentum, tmp_path):
    # −1/tokens Σ_i R_i ∇ Σ_t log π(o_it); before the first batch there is no baseline yet
    call, ours = run(
        trl_ext.GRPOTrainer,
        trl_ext.GRPOConfig,
        tmp_path,
        advantage_estimator="reinforce",
        reinforce_baseline_momentum=momentum,
        loss_type="dapo",
    )
    tokens = sum(map(len, call.completion_ids))
    formula = -(torch.tensor(call.rewards).unsqueeze(1) * score_gradients(call)).sum(dim=0) / tokens
    assert relative_error(ours, formula) <= 1e-5


@pytest.mark.train
def test_reinforce_with_a_baseline(tmp_path):
    # The second step subtracts the mean of the first, and has other weights: at learning rate 0 it has the same ones
    reward, gradients = tiny.Remembering(tiny.hashed), Gradients()
    settings = tiny.cpu_settings(tmp_path, max_steps=2, optim="sgd", max_grad_norm=0.0, learning_rate=0.0)
    trainer = trl_ext.GRPOTrainer(
        model=tiny.stopping(),
        reward_funcs=reward,
        args=trl_ext.GRPOConfig(
            **settings, advantage_estimator="reinforce", reinforce_baseline_momentum=0.9, loss_type="dapo"
        ),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    first, second = reward.calls
    baseline = sum(first.rewards) / len(first.rewards)
    advantages = torch.tensor(second.rewards) - baseline
    tokens = sum(map(len, second.completion_ids))
    formula = -(advantages.unsqueeze(1) * score_gradients(second)).sum(dim=0) / tokens
    assert relative_error(gradients.vectors[1], formula) <= 1e-5
