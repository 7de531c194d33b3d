"""What is read of prompts: the policy's own states, in chunks, without a trace in the run."""

from typing import Any

import pytest
import tiny
import torch

from trl_ext import GRPOTrainer, PPOTrainer
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


def test_reads_the_states_of_an_adapter(tmp_path):
    torch.manual_seed(4)
    arguments = {"peft_config": tiny.lora(), "train_dataset": tiny.prompts(40)}
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, arguments)
    row = {"prompt": "w1 w2 w3"}
    ids = torch.tensor([trainer.processing_class(row["prompt"])["input_ids"]])
    found, _ = read_prompts(trainer, [row], Plain(0))
    last = [trainer.model(ids, output_hidden_states=True).hidden_states[1][0, -1]]
    with trainer.model.disable_adapter():
        last.append(trainer.model(ids, output_hidden_states=True).hidden_states[1][0, -1])
    adapted, base = (states.double().detach().numpy() for states in last)
    assert found[0, -len(adapted) :] == pytest.approx(adapted, abs=1e-6)
    assert abs(adapted - base).max() > 0.01


@pytest.mark.parametrize("adapted", [False, True])
def test_reads_a_critics_value_of_the_prompt_in_the_same_pass(tmp_path, adapted, subtests):
    arguments = {"train_dataset": tiny.prompts(40), **({"peft_config": tiny.lora()} if adapted else {})}
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, arguments, critic="head", num_iterations=1)
    rows = [{"prompt": text} for text in ("w1", "w2 w3 w4 w5", "w6 w7")]
    calls, projection = [], Plain(0)
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    with subtests.test("a new critic's values, which are all 0, stay in units of reward"):
        found, _ = read_prompts(trainer, rows, projection)
        assert found[:, 1].tolist() == [0.0] * 3
        assert projection.plain == 2 and projection.state_dict()["scale"][1] == 1.0
    weight = torch.linspace(-1, 1, 16)
    trainer.critic.head.out.weight.data.copy_(weight)
    trainer.critic.head.out.bias.data.fill_(0.25)
    found, _ = read_prompts(trainer, rows, projection)
    assert len(calls) == 3  # two for the first, which also fits the projection
    with subtests.test("the value after the prompt's last token"):
        for row, values in zip(rows, found, strict=True):
            ids = torch.tensor([trainer.processing_class(row["prompt"])["input_ids"]])
            output = trainer.model(ids, output_hidden_states=True)
            assert values[1] == pytest.approx(float(output.hidden_states[-1][0, -1] @ weight + 0.25), abs=1e-5)
    with subtests.test("passes beside it compute none"):
        assert not hasattr(output, "state_values") and trainer.critic._hidden is None
    with subtests.test("standardised where they differ"):
        learned = Projection(0)
        read_prompts(trainer, rows, learned)
        assert learned.state_dict()["scale"][1] == pytest.approx(found[:, 1].std())


def test_a_critic_with_a_pass_of_its_own_is_not_read(tmp_path):
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, critic="model", num_iterations=1)
    projection = Plain(0)
    found, _ = read_prompts(trainer, [{"prompt": "w1 w2"}], projection)
    assert found.shape == (1, 1 + 3 * 16) and projection.plain == 1


@pytest.mark.train
def test_ppo_chooses_by_values_too(tmp_path):
    settings = {"rollout_selection": "refill", "refill_draws": "informed", "num_generations": 4, "num_iterations": 1}
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.first_token_even, critic="head", max_steps=3, **settings)
    trainer.train()
    assert trainer.chooser.features.projection.plain == 2
    for outlook in trainer.chooser.outlooks:
        precision = outlook.state_dict()["rates"]["weights"]["precision"]
        assert len(precision) == 1 + 2 + 48  # a constant, what stands for itself, and three times 16 states
        assert (
            outlook._rates._weights._prior[2, 2] == outlook._rates._weights._prior[1, 1]
        )  # as wide as that of length


@pytest.mark.parametrize("obstacle", ["_is_vlm", "environment_factories", "rollout_func", "states"])
def test_what_cannot_be_read(trainer, obstacle, monkeypatch, caplog):
    if obstacle == "states":
        monkeypatch.setattr(trainer.model, "forward", lambda **_: type("Output", (), {"hidden_states": None})())
    else:
        monkeypatch.setattr(trainer, obstacle, True)
    assert read_prompts(trainer, [{"prompt": 7 if obstacle == "rollout_func" else "a"}], Projection(0)) is None
    assert caplog.text.count("Prompts are predicted without their hidden states") == 1
