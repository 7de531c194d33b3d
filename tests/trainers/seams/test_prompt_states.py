"""What is read of prompts: the policy's own states, in chunks, without a trace in the run."""

from typing import Any

import pytest
import tiny
import torch

from trl_ext import GRPOTrainer
from trl_ext.rollouts.prompt_features import Projection
from trl_ext.trainers.seams.checkpoints import random_states
from trl_ext.trainers.seams.prompt_states import chunks_of, read_prompts


class Plain(Projection):
    """Leaves what was read as it is, in float64."""

    def __call__(self, read: torch.Tensor) -> Any:
        return read.numpy()


def test_chunks():
    assert chunks_of([5]) == [(0, 1)]
    assert chunks_of([5] * 70) == [(0, 32), (32, 64), (64, 70)]
    # At most 8,192 tokens with padding: 2 × 4,000, then a prompt that is longer than that, then the others
    assert chunks_of([4000, 3000, 3000, 9000, 10, 10]) == [(0, 2), (2, 3), (3, 4), (4, 6)]


@pytest.fixture
def trainer(tmp_path):
    arguments = {"model": tiny.qwen2(attention_dropout=0.5), "train_dataset": tiny.prompts(40)}
    return tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, arguments)


def test_reads_the_states_of_the_middle_layer_in_chunks(trainer, monkeypatch, subtests):
    rows = [{"prompt": text} for text in ("a", "a much longer one", *(f"prompt {i}" for i in range(36)))]
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    before, trained = random_states(), [module.training for module in trainer.model.modules()]
    found, tokens = read_prompts(trainer, rows, Plain(0))
    with subtests.test("without a trace"):
        assert torch.equal(random_states()["torch"], before["torch"])
        assert [module.training for module in trainer.model.modules()] == trained and trainer.model.training
    with subtests.test("two chunks, and one more to standardise by"):
        assert len(calls) == 3
    ids = trainer.processing_class([row["prompt"] for row in rows])["input_ids"]
    assert tokens == sum(map(len, ids))
    trainer.model.eval()
    for row, prompt in zip(found, ids, strict=True):
        layers = trainer.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        states = layers[len(layers) // 2][0].double().detach()
        parts = [torch.tensor([len(prompt)]).log(), states.mean(0), states.std(0, correction=0), states[-1]]
        assert row == pytest.approx(torch.cat(parts).numpy(), abs=1e-5)


@pytest.mark.parametrize("obstacle", ["_is_vlm", "environment_factories", "rollout_func", "states"])
def test_what_cannot_be_read(trainer, obstacle, monkeypatch, caplog):
    if obstacle == "states":
        monkeypatch.setattr(trainer.model, "forward", lambda **_: type("Output", (), {"hidden_states": None})())
    else:
        monkeypatch.setattr(trainer, obstacle, True)
    assert read_prompts(trainer, [{"prompt": 7 if obstacle == "rollout_func" else "a"}], Projection(0)) is None
    assert caplog.text.count("Prompts are predicted without their hidden states") == 1
