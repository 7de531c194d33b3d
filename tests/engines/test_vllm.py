"""
Training with TRL's colocated vLLM engine, with a stub in its place (`vllm_stub.py`): rollouts come from the engine,
nothing else changes, and the engine generates with the weights that the policy has. Where the engine's
log-probabilities are not the policy's, TRL's correction reaches the loss, each row with its own weight.
"""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, largest_relative_error
from engines.vllm_stub import SamplingParams, StubLLM, skew_of
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
# Where completions are told to end
ENDS = pytest.mark.parametrize(
    ("trainer_class", "settings", "ends"),
    [
        (GRPOTrainer, {"generation_kwargs": {"eos_token_id": 9}}, {2, 9}),
        (GRPOTrainer, {"generation_kwargs": {"stop_token_ids": [9, 10]}}, {2, 9, 10}),
        (PPOTrainer, {"stop_token_id": 9, "num_iterations": 1}, {9}),
    ],
)
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
    "PPO, adapter": (PPOTrainer, {"num_iterations": 1, "critic": "adapter"}, lambda: {"peft_config": tiny.lora()}),
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


SLEEPY: dict[str, tuple[Any, dict[str, Any]]] = {
    "GRPO": (GRPOTrainer, {}),
    "DAPO": (DAPOTrainer, {}),
    "DAPO, chunks": (DAPOTrainer, {"rewards_in_flight": 2, "generation_chunks": 2}),
    "DUPO": (DUPOTrainer, {}),
}


@pytest.mark.parametrize("case", SLEEPY)
def test_an_engine_sleeps_once_a_batch(case, engines, policy, tmp_path):
    """And gets its weights once, however many rounds and chunks the batch has."""
    trainer_class, settings = SLEEPY[case]
    trainer = built(trainer_class, tmp_path, policy, vllm_enable_sleep_mode=True, **settings)
    (engine,) = engines
    assert engine.asleep and engine.naps == 1
    trainer.train()
    assert engine.asleep and engine.naps == 3 and engine.syncs == len(trainer.batches) == 2
    assert all(log[DIFFERENCE] < 1e-4 for log in tiny.history(trainer))
    if "DAPO" in case:
        assert len(engine.lengths) > 2
    trainer.roll_out([trainer.train_dataset[i] for i in range(3)], 2, seed=1)
    assert engine.asleep and engine.naps == 4 and engine.syncs == 3


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


@ENDS
def test_the_engine_ends_completions_where_it_is_told(trainer_class, settings, ends, engines, policy, tmp_path):
    trainer = built(trainer_class, tmp_path, policy, max_completion_length=16, **settings)
    trainer.train()
    found = [ids for batch in trainer.batches for ids in batch.completions]
    assert set(trainer.eos_token_ids) == ends
    assert all(not ends & set(ids[:-1]) and (len(ids) == 16 or ids[-1] in ends) for ids in found)
    assert {ids[-1] for ids in found if len(ids) < 16} == ends
    assert trainer.args.generation_kwargs == settings.get("generation_kwargs")


# An engine whose log-probabilities are off. By how much follows from token and position, so that the weights of a row
# follow from its ids.

SKEW = 0.4
# Bounds that some ratios exceed on each side
BOUNDS = {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.4}
SGD = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant"}


def weights_of(ids: list[int], mode: str) -> list[float]:
    """π_old/μ of a completion's tokens, or of the whole, clipped or masked."""
    differences = [-SKEW * skew_of(token, position) for position, token in enumerate(ids)]
    ratios = [math.exp(d) for d in ([sum(differences)] * len(ids) if "sequence" in mode else differences)]
    low, high = BOUNDS.values()
    if "truncate" in mode:
        return [min(max(ratio, low), high) for ratio in ratios]
    return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]


def skewed(trainer_class: Any, mode: str, tmp_path: Path, policy: str, engines: Any, **settings: Any) -> Any:
    """A trainer that was trained with such an engine, and the gradients of its steps."""
    gradients = Gradients()
    given = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_correction": True, **BOUNDS, **SGD}
    if trainer_class is trl.GRPOTrainer:
        given |= {"use_vllm": True, "vllm_mode": "colocate", "seed": 3}
        arguments = {"model": policy, "train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()}
        config = trl.GRPOConfig(**tiny.cpu_settings(tmp_path, **{**given, **settings}))
        trainer = trl.GRPOTrainer(reward_funcs=SOME, args=config, callbacks=[gradients], **arguments)
    else:
        trainer = built(trainer_class, tmp_path, policy, {"callbacks": [gradients]}, **{**given, **settings})
    engines[-1].skew = SKEW
    trainer.train()
    return trainer, gradients.vectors


CORRECTED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "token": (GRPOTrainer, "token_truncate", {}),
    "sequence": (GRPOTrainer, "sequence_mask", {}),
    "refilled": (DAPOTrainer, "sequence_truncate", {}),
    "copied": (DUPOTrainer, "token_mask", {"updates_per_generation": 1}),
    "replayed": (PPOTrainer, "token_truncate", {"num_iterations": 1, "replay_ratio": 0.5, "max_steps": 3}),
}


@pytest.mark.parametrize("case", CORRECTED)
def test_every_row_has_its_own_correction(case, engines, policy, tmp_path):
    """From fitted micro-batches and shared prompts, the gradient is TRL's, or that of the same run without them."""
    trainer_class, mode, settings = CORRECTED[case]
    plain = (trl.GRPOTrainer, settings) if trainer_class is GRPOTrainer else None
    plain = plain or (trainer_class, {"fit_micro_batches": False, "share_prefixes": False, **settings})
    _, theirs = skewed(plain[0], mode, tmp_path / "plain", policy, engines, **plain[1])
    trainer, ours = skewed(
        trainer_class, mode, tmp_path / "ours", policy, engines, share_prefixes="always", **settings
    )
    assert largest_relative_error(ours, theirs) <= 1e-5
    seen = set()
    for batch in trainer.losses:
        mask = batch["completion_mask"].bool()
        weights = batch["importance_sampling_ratio"].expand(-1, mask.size(1))
        for ids, found, tokens in zip(batch["completion_ids"], weights, mask, strict=True):
            expected = weights_of(ids[tokens].tolist(), mode)
            assert found[tokens].tolist() == pytest.approx(expected, abs=1e-4)
            seen |= set(expected)
    assert any(0 < abs(weight - 1) < 0.3 for weight in seen) and any(
        weight in (0, *BOUNDS.values()) for weight in seen
    )
    assert (
        trainer.saved_compute.regrouped_rows > 0 and trainer.sharing.token_slots < trainer.sharing.token_slots_unshared
    )
    assert case != "refilled" or any(len(batch.rounds) > 1 for batch in trainer.batches)
    assert case != "copied" or trainer.saved_compute.merged_rows > 0


def test_a_trust_region_is_around_the_policy_of_the_engine(engines, policy, tmp_path):
    """The ratio is π/μ, with TRL's correction of π/π_old or without one. Tokens are dropped before any update."""
    settings = {"trust_region": "binary_tv", "trust_region_threshold": 0.05}
    whole = {"vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": 1e6}
    runs = {
        correction: skewed(
            GRPOTrainer,
            "token_truncate",
            tmp_path / str(correction),
            policy,
            engines,
            **{**settings, **whole, "vllm_importance_sampling_correction": correction},
        )
        for correction in (True, False)
    }
    assert largest_relative_error(runs[True][1], runs[False][1]) <= 1e-5
    trainer = runs[True][0]
    dropped, total = 0, 0
    for batch in trainer.losses[: len(trainer.losses) // 2]:  # of the first generation batch
        mask = batch["completion_mask"].bool()
        logps, rows = batch["old_per_token_logps"], zip(batch["completion_ids"], mask, strict=True)
        for (ids, tokens), of_row, advantage in zip(rows, logps, batch["advantages"], strict=True):
            for position, (token, logp) in enumerate(zip(ids[tokens].tolist(), of_row[tokens].tolist(), strict=True)):
                mu = math.exp(logp + SKEW * skew_of(token, position))
                away = advantage * (math.exp(logp) - mu) > 0
                dropped += bool(away and abs(math.exp(logp) - mu) > 0.05)
        total = batch["fit"].all_tokens
    found = tiny.history(trainer)[0]["trust_region/dropped"]
    assert 0 < found == pytest.approx(dropped / total, rel=1e-4)
