"""
Training with TRL's colocated vLLM engine, with a stub in its place (`vllm_stub.py`): rollouts come from the engine,
nothing else changes, and the engine generates with the weights that the policy has.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines.vllm_stub import SamplingParams, StubLLM
from trl.generation import vllm_generation

from trl_ext import (
    DAPOTrainer,
    DifficultyCurriculum,
    DUPOTrainer,
    GRPOTrainer,
    GSPOTrainer,
    PPOTrainer,
    RLOOTrainer,
)


pytestmark = pytest.mark.train

# Prompts i with i % 20 in these have variance: 16 of 32
SOME = tiny.LiveFor(set(range(4, 24, 2)))
DIFFERENCE = "sampling/sampling_logp_difference/max"
IDS = torch.tensor([[5, 9, 4, 17, 8, 2], [7, 7, 11, 20, 2, 4]])


@pytest.fixture
def engines(monkeypatch):
    """TRL takes the stub for vLLM while a test runs. All engines that were made."""
    made: list[StubLLM] = []

    def engine(model: str, **settings: Any) -> StubLLM:
        made.append(StubLLM(model))
        return made[-1]

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_generation, "LLM", engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SamplingParams, raising=False)
    before = dict(os.environ)
    yield made
    # TRL tells vLLM its rank in variables that the next trainer would take for a launcher's
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """An engine loads its model from a folder."""
    folder = tmp_path_factory.mktemp("policy")
    tiny.stopping().save_pretrained(folder)
    return str(folder)


def built(trainer_class: Any, tmp_path: Path, policy: str, arguments: Any = None, **settings: Any) -> Any:
    given = {"model": policy, **(arguments or {})}
    settings = {"use_vllm": True, "vllm_mode": "colocate", "seed": 3, **settings}
    return tiny.trainer(tiny.recorded(trainer_class), tmp_path, SOME, given, **settings)


METHODS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "GRPO": (GRPOTrainer, {}, dict),
    "GRPO, LoRA": (GRPOTrainer, {}, lambda: {"peft_config": tiny.lora()}),
    "DAPO": (DAPOTrainer, {}, dict),
    "DUPO": (DUPOTrainer, {}, dict),
    "GSPO": (GSPOTrainer, {"updates_per_generation": 2, "max_steps": 4}, dict),
    "RLOO": (RLOOTrainer, {"beta": 0.1, "vllm_importance_sampling_correction": True}, dict),
    "PPO, head": (PPOTrainer, {"num_iterations": 1, "critic_learning_rate": 0.1}, dict),
    "PPO, model": (PPOTrainer, {"num_iterations": 1, "critic": "model"}, dict),
    "PPO, head and LoRA": (PPOTrainer, {"num_iterations": 1}, lambda: {"peft_config": tiny.lora()}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_what_the_engine_generates(method, engines, policy, tmp_path):
    trainer_class, settings, arguments = METHODS[method]
    trainer = built(trainer_class, tmp_path, policy, arguments(), **settings)
    before = tiny.weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in tiny.weights(trainer.model).items())
    (engine,) = engines
    batches = trainer.batches
    assert len(batches) == 2
    assert len(engine.lengths) == sum(max(1, len(batch.rounds)) for batch in batches)
    generated = [length for lengths in engine.lengths for length in lengths]
    assert trainer.counters.generated_tokens == sum(generated)
    # The engine's log-probabilities are the policy's own, for every token that is trained on
    logs = [log for log in tiny.history(trainer) if DIFFERENCE in log]
    assert len(logs) == len(batches) and all(log[DIFFERENCE] < 1e-4 for log in logs)
    if trainer_class is DAPOTrainer:
        assert any(len(batch.rounds) > 1 for batch in batches)
    if trainer_class is DUPOTrainer:
        assert any(batch.selection.sources != [0, 1, 2, 3] for batch in batches)


@pytest.mark.parametrize("method", METHODS)
def test_after_every_sync_the_engine_is_the_policy(method, engines, policy, tmp_path):
    trainer_class, settings, arguments = METHODS[method]
    trainer = built(trainer_class, tmp_path, policy, arguments(), **settings)
    (engine,) = engines
    seen: list[torch.Tensor] = []

    @torch.no_grad()
    def compare() -> None:
        engines_logits, policys_logits = (model(IDS).logits for model in (engine.model, trainer.model))
        torch.testing.assert_close(engines_logits, policys_logits, atol=1e-5, rtol=1e-5)
        seen.append(engines_logits)

    engine.on_sync = compare
    trainer.train()
    assert len(seen) == engine.syncs == len(trainer.batches) == 2
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)


def test_a_curriculum_limits_the_engines_completions(engines, policy, tmp_path):
    curriculum = DifficultyCurriculum("mixed", start_completion_length=2)
    trainer = built(GRPOTrainer, tmp_path, policy, {"curriculum": curriculum}, max_steps=4)
    trainer.train()
    longest = [max(lengths) for lengths in engines[0].lengths]
    assert longest[0] == 2
    assert longest == sorted(longest) and longest[-1] > 2
    assert trainer.vllm_generation.max_completion_length == trainer.args.max_completion_length == 6


def test_a_look_beside_training_uses_the_engine_and_counts_nothing(engines, policy, tmp_path):
    trainer = built(GRPOTrainer, tmp_path, policy)
    trainer.train()
    counted = trainer.counters.generated_tokens
    rewards = trainer.roll_out([trainer.train_dataset[i] for i in range(3)], 2, seed=1).rewards
    assert rewards.shape == (3, 2, 1)
    assert [len(lengths) for lengths in engines[0].lengths][-1] == 6
    assert trainer.counters.generated_tokens == counted


def test_a_resumed_run_hands_its_weights_to_the_engine_before_it_generates(engines, policy, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    built(GRPOTrainer, tmp_path, policy, **settings).train()
    resumed = built(GRPOTrainer, tmp_path, policy, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert engines[1].syncs == 1
    (log,) = [log for log in tiny.history(resumed) if log["step"] == 2]
    assert log[DIFFERENCE] < 1e-4


@pytest.mark.parametrize(
    ("trainer_class", "settings", "ends"),
    [
        (GRPOTrainer, {"generation_kwargs": {"eos_token_id": 9}}, {2, 9}),
        (GRPOTrainer, {"generation_kwargs": {"stop_token_ids": [9, 10]}}, {2, 9, 10}),
        (PPOTrainer, {"stop_token_id": 9, "num_iterations": 1}, {9}),
    ],
)
def test_the_engine_ends_completions_where_it_is_told(trainer_class, settings, ends, engines, policy, tmp_path):
    trainer = built(trainer_class, tmp_path, policy, max_completion_length=16, **settings)
    trainer.train()
    found = [ids for batch in trainer.batches for ids in batch.completions]
    assert set(trainer.eos_token_ids) == ends
    assert all(not ends & set(ids[:-1]) and (len(ids) == 16 or ids[-1] in ends) for ids in found)
    assert {ids[-1] for ids in found if len(ids) < 16} == ends
    assert trainer.args.generation_kwargs == settings.get("generation_kwargs")
