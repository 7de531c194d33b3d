"""GSPO and GSPO-token through TRL's own loss: hand-written twins on batches that real, off-policy training made."""

import copy
import math
from typing import Any

import pytest
import tiny
import torch

from trl_ext import GRPOTrainer, GSPOTrainer


pytestmark = pytest.mark.train


# Every loss that divides, sums or averages in its own way
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"]


def gspo(tmp_path: Any, level: str, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    return tiny.trainer(
        tiny.recorded(GSPOTrainer),
        tmp_path,
        tiny.hashed,
        arguments,
        **{"importance_sampling_level": level, "updates_per_generation": 2, "learning_rate": 3e-3, **settings},
    )


@pytest.fixture(scope="module")
def off_policy(tmp_path_factory):
    """A trained model, and a micro-batch that an earlier state of it sampled."""
    trainer = gspo(tmp_path_factory.mktemp("off_policy"), "sequence", max_steps=3, num_iterations=2)
    trainer.train()
    return tiny.weights(trainer.model), trainer._buffered_inputs[0]


def at(tmp_path: Any, off_policy: Any, level: str, **settings: Any) -> Any:
    """A trainer in mid-training, with the weights of `off_policy`."""
    trainer = gspo(tmp_path, level, max_steps=1, **settings)
    trainer.train()
    trainer.model.load_state_dict(off_policy[0])
    trainer.model.train()
    return trainer


def loss_and_gradient(trainer: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in trainer.model.parameters()]


def slow_logps(model: torch.nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Log-probabilities of each completion's tokens, one row at a time and without padding."""
    rows = []
    for i in range(len(inputs["prompt_ids"])):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
        ids = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()].tolist()
        logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        rows.append(torch.stack([logits[len(prompt) - 1 + t, token] for t, token in enumerate(ids)]))
    return rows


def slow_gspo(model: Any, inputs: dict[str, Any], low: float, high: float) -> tuple[float, list[torch.Tensor], int]:
    """
    −1/B Σ_i 1/|o_i| Σ_t min(s_it A_it, clip(s_it) A_it), eq. 13 with plain loops. The gradient of s_it is s_i ∇logp_it
    (eq. 14), or nothing where the clip holds; a linear function of logp with these coefficients has the same gradient.
    """
    value, surrogate, clipped = 0.0, torch.zeros(()), 0
    logps = slow_logps(model, inputs)
    for i, row in enumerate(logps):
        old = inputs["old_per_token_logps"][i].tolist()
        s = math.exp(sum(new - before for new, before in zip(row.tolist(), old, strict=False)) / len(row))
        for t, logp in enumerate(row):
            advantage = inputs["advantages"][i]
            a = float(advantage[t] if advantage.dim() else advantage)
            held = (s > 1 + high and a > 0) or (s < 1 - low and a < 0)
            clipped += held
            value -= min(s * a, min(max(s, 1 - low), 1 + high) * a) / len(row) / len(logps)
            if not held:
                surrogate = surrogate - a * s * logp / len(row) / len(logps)
    model.zero_grad()
    surrogate.backward()
    return value, [parameter.grad.clone() for parameter in model.parameters()], clipped


def token_advantages(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with an advantage for every token."""
    shape = inputs["completion_ids"].shape
    return {**inputs, "advantages": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def test_the_batch_is_off_policy(off_policy, tmp_path):
    trainer = at(tmp_path, off_policy, "sequence")
    inputs = off_policy[1]
    ratios = [
        math.exp((row.detach() - old[: len(row)]).mean())
        for row, old in zip(slow_logps(trainer.model, inputs), inputs["old_per_token_logps"], strict=True)
    ]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.005
    assert min(ratios) < 1 < max(ratios)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (0.01, 0.02)], ids=["papers", "wide"])
def test_sequence_token_equals_sequence(off_policy, tmp_path, loss_type, clip):
    # One advantage a sequence: equal in value and gradient, whatever the normalisation
    results = [
        loss_and_gradient(
            at(tmp_path, off_policy, level, loss_type=loss_type, epsilon=clip[0], epsilon_high=clip[1]),
            off_policy[1],
        )
        for level in ("sequence", "sequence_token")
    ]
    torch.testing.assert_close(results[0][0], results[1][0])
    assert sum(float(gradient.abs().sum()) for gradient in results[0][1]) > 1e-3
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (0.005, 0.005)], ids=["papers", "wide"])
def test_slow_twin(off_policy, tmp_path, level, clip):
    trainer = at(tmp_path, off_policy, level, epsilon=clip[0], epsilon_high=clip[1])
    inputs = off_policy[1]
    value, gradients, clipped = slow_gspo(trainer.model, inputs, *clip)
    assert clipped
    loss, found = loss_and_gradient(trainer, inputs)
    steps = trainer.current_gradient_accumulation_steps
    torch.testing.assert_close(loss, torch.tensor(value / steps), rtol=1e-4, atol=1e-6)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other / steps, rtol=1e-3, atol=1e-6)


def test_slow_twin_with_advantages_per_token(off_policy, tmp_path):
    clip = (0.002, 0.002)
    trainer = at(tmp_path, off_policy, "sequence_token", epsilon=clip[0], epsilon_high=clip[1])
    inputs = token_advantages(off_policy[1])
    value, gradients, clipped = slow_gspo(trainer.model, inputs, *clip)
    assert 0 < clipped < int(inputs["completion_mask"].sum())
    loss, found = loss_and_gradient(trainer, inputs)
    steps = trainer.current_gradient_accumulation_steps
    torch.testing.assert_close(loss, torch.tensor(value / steps), rtol=1e-4, atol=1e-6)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other / steps, rtol=1e-3, atol=1e-6)


def test_sequence_token_differs_from_token(off_policy, tmp_path):
    # or GSPO-token could be TRL's token ratio under another name
    wide = {"epsilon": 0.015, "epsilon_high": 0.015}
    token = at(tmp_path, off_policy, "token", epsilon=0.2, epsilon_high=0.2)
    ours = at(tmp_path, off_policy, "sequence_token", **wide)
    one, other = (loss_and_gradient(trainer, off_policy[1])[1] for trainer in (token, ours))
    assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) > 1e-4


def test_tokens_of_an_environment_are_no_part_of_the_ratio(off_policy, tmp_path):
    trainer = at(tmp_path, off_policy, "sequence_token", epsilon=0.015, epsilon_high=0.015)
    mask = torch.ones_like(off_policy[1]["completion_mask"])
    mask[:, 1] = 0
    inputs = {**off_policy[1], "tool_mask": mask}
    moved = {**inputs, "old_per_token_logps": inputs["old_per_token_logps"].clone()}
    moved["old_per_token_logps"][:, 1] = -50.0
    first, second = loss_and_gradient(trainer, inputs), loss_and_gradient(trainer, moved)
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


def test_padding_content_does_not_matter(off_policy, tmp_path):
    trainer = at(tmp_path, off_policy, "sequence_token", epsilon=0.015, epsilon_high=0.015)
    inputs = off_policy[1]
    padding = inputs["completion_mask"] == 0
    assert padding.any()
    other = {**inputs}
    other["old_per_token_logps"] = inputs["old_per_token_logps"].masked_fill(padding, 7.0)
    other["completion_ids"] = inputs["completion_ids"].masked_fill(padding, 9)
    first, second = loss_and_gradient(trainer, inputs), loss_and_gradient(trainer, other)
    torch.testing.assert_close(first[0], second[0])
    for one, changed in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(one, changed)


def test_the_batch_is_left_alone(off_policy, tmp_path):
    # It is used again in the next iteration
    trainer = at(tmp_path, off_policy, "sequence_token")
    inputs = dict(off_policy[1])
    # log-probabilities that no earlier loss can have put there
    inputs["old_per_token_logps"] = -torch.rand(inputs["old_per_token_logps"].shape)
    before = copy.deepcopy(inputs)
    trainer._compute_loss(trainer.model, inputs)
    assert inputs.keys() == before.keys()
    for name, value in inputs.items():
        same = torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
        assert same, name


def test_off_policy_mask_measures_the_real_drift(off_policy, tmp_path):
    settings = {"epsilon": 0.015, "epsilon_high": 0.015, "off_policy_mask_threshold": 0.002}
    results = [
        loss_and_gradient(at(tmp_path, off_policy, level, **settings), off_policy[1])
        for level in ("sequence", "sequence_token")
    ]
    free = at(tmp_path, off_policy, "sequence", epsilon=0.015, epsilon_high=0.015)
    unmasked = loss_and_gradient(free, off_policy[1])
    assert not torch.isclose(results[0][0], unmasked[0])  # the mask does something
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changed", [{}, {"beta": 0.1, "use_bias_correction_kl": False}], ids=["plain", "with KL"])
def test_whole_runs_agree(tmp_path, changed):
    # SGD, because Adam would hide a wrong constant. The reference is loaded by the model's name.
    tiny.stopping().save_pretrained(tmp_path / "model")
    settings = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 6, "num_iterations": 2, **changed}
    runs = []
    for level in ("sequence", "sequence_token"):
        model = str(tmp_path / "model")
        trainer = gspo(tmp_path, level, {"model": model}, epsilon=0.02, epsilon_high=0.02, **settings)
        trainer.train()
        runs.append(trainer)
    before = tiny.stopping().state_dict()
    assert any((value - before[name]).abs().max() > 0.01 for name, value in runs[0].model.state_dict().items())
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(value, runs[1].model.state_dict()[name], rtol=1e-4, atol=1e-5)
    for one, other in zip(*(tiny.history(run) for run in runs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["clip_ratio/region_mean"] >= 0


def test_on_policy_steps_are_plain_grpo(tmp_path):
    # One step a generation: every ratio is 1, and TRL leaves out the old log-probabilities
    runs = []
    for level in ("sequence", "sequence_token"):
        trainer = gspo(tmp_path, level, optim="sgd", learning_rate=0.3, max_steps=2, updates_per_generation=1)
        trainer.train()
        assert "old_per_token_logps" not in trainer.batches[0].output
        runs.append(tiny.weights(trainer.model))
    plain = tiny.trainer(
        GRPOTrainer, tmp_path, tiny.hashed, loss_type="grpo", optim="sgd", learning_rate=0.3, max_steps=2
    )
    plain.train()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(runs[0][name], value)
        torch.testing.assert_close(runs[1][name], value)


@pytest.mark.parametrize("selection", ["refill", "duplicate"])
@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_combines_with_selection(tmp_path, selection, level):
    trainer = gspo(tmp_path, level, max_steps=4, rollout_selection=selection)
    trainer.reward_funcs[0].func = tiny.LiveFor(set(range(4, 24, 2)))
    trainer.train()
    assert any(not all(batch.selection.live) or len(batch.rounds) > 1 for batch in trainer.batches)
    assert all(math.isfinite(entry["loss"]) for entry in tiny.history(trainer))
