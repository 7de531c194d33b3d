"""The divergence from the reference, computed a second time with plain logits, one completion at a time."""

from statistics import fmean

import pytest
import tiny
import torch

from trl_ext import GRPOTrainer, PPOTrainer
from trl_ext.evaluation.divergence import KL, kl_of_completions
from trl_ext.evaluation.held_out import evaluate_policy


ROWS = list(tiny.prompts(6))


def logp_of(model, rollout):
    ids = rollout.prompt_ids + rollout.completion_ids
    logits = model(input_ids=torch.tensor([ids])).logits[0, len(rollout.prompt_ids) - 1 : -1]
    chosen = torch.tensor(rollout.completion_ids).unsqueeze(1)
    return float(logits.log_softmax(-1).gather(1, chosen).sum())


CASES = {
    "an adapter": (GRPOTrainer, {"peft_config": tiny.lora()}, {}),
    "a reference model": (GRPOTrainer, {}, {"beta": 0.1}),
    "a critic beside it": (PPOTrainer, {}, {"kl_coef": 0.1}),
}


@pytest.mark.train
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_kl_is_that_of_plain_logits(name, tmp_path):
    trainer_class, given, settings = CASES[name]
    trainer = tiny.trainer(trainer_class, tmp_path, tiny.hashed, given, max_steps=3, **settings)
    with torch.enable_grad():
        trainer.train()
    rollouts = trainer.roll_out(ROWS, 2, seed=0).rollouts
    found = kl_of_completions(trainer, rollouts)
    model = trainer.model.eval()
    for rollout, kl in zip(rollouts, found.tolist(), strict=True):
        policy = logp_of(model, rollout)
        if trainer.ref_model is not None:
            reference = logp_of(trainer.ref_model, rollout)
        else:
            with model.disable_adapter():
                reference = logp_of(model, rollout)
        assert kl == pytest.approx(policy - reference, abs=1e-4)
    assert found.abs().max() > 1e-2
    measured = evaluate_policy(trainer, ROWS, num_samples=2, kl=True)
    assert measured[KL].samples == measured[KL].prompts == len(ROWS)
    assert measured[KL].mean == pytest.approx(fmean(found[::2].tolist()))


def test_the_start_has_not_moved_and_nothing_is_told_without_a_reference(tmp_path):
    adapter = {"peft_config": tiny.lora(init_lora_weights=True)}
    adapted = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, adapter)
    start = evaluate_policy(adapted, ROWS, num_samples=2, kl=True)[KL]
    assert (start.mean, start.low, start.high) == (0.0, 0.0, 0.0)
    alone = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, beta=0.0)
    assert list(evaluate_policy(alone, ROWS, num_samples=2, kl=True)) == ["hashed"]


def test_what_a_tool_wrote_does_not_count(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, beta=0.1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.1)
    (rollout, *_) = trainer.roll_out(ROWS[:1], 2, seed=0).rollouts
    whole = float(kl_of_completions(trainer, [rollout])[0])
    rollout.tool_mask = [0] * len(rollout.completion_ids)
    assert whole != 0.0 and float(kl_of_completions(trainer, [rollout])[0]) == 0.0
