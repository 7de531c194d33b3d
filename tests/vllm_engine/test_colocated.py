"""
Training with TRL's colocated engine and a real vLLM in it: after each step the engine is the policy, and what it
samples is what is trained on.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
import vllm
from comparing import Gradients, largest_relative_error
from engines.test_vllm import DIFFERENCE, ENDS, METHODS, SGD, SOME, built
from trainers.test_tools import VOCABULARY
from upstream.test_parity import ToolTokenizer
from vllm_engine.cpu_engine import cpu_engines, weights_of

from trl_ext import DAPOTrainer, DifficultyCurriculum, DUPOTrainer, GRPOTrainer, PPOTrainer


pytestmark = pytest.mark.train

FEATURES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "informed draws": (DAPOTrainer, {"refill_draws": "informed", "max_steps": 3}, dict),
    "groups of different sizes": (
        DAPOTrainer,
        {"refill_draws": "informed", "max_num_generations": 8, "max_steps": 3},
        dict,
    ),
    "rewards ahead": (GRPOTrainer, {"rewards_in_flight": 2}, dict),
    "rewards ahead of chunks": (DAPOTrainer, {"rewards_in_flight": 2, "generation_chunks": 2}, dict),
    "iterations": (GRPOTrainer, {"num_iterations": 2, "max_steps": 4}, dict),
    "iterations of PPO": (PPOTrainer, {"num_iterations": 2, "max_steps": 4}, dict),
    "a reference": (GRPOTrainer, {"beta": 0.1}, lambda: {"peft_config": tiny.lora()}),
    "a curriculum": (
        GRPOTrainer,
        {"max_steps": 3},
        lambda: {"curriculum": DifficultyCurriculum("mixed", start_completion_length=2)},
    ),
}


@pytest.mark.parametrize("case", [*METHODS, *FEATURES])
def test_training(case, engines, watched, policy, tmp_path):
    trainer_class, settings, arguments = {**METHODS, **FEATURES}[case]
    trainer = built(trainer_class, tmp_path, policy, arguments(), **settings)
    watch = watched(trainer)
    assert isinstance(trainer.vllm_generation.llm, vllm.LLM)
    before = tiny.weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in tiny.weights(trainer.model).items())
    batches, chunks = trainer.batches, settings.get("generation_chunks", 1)
    assert len(batches) >= 2
    # Weights are sent once for a batch, however many rounds and chunks it has
    assert watch.syncs == len(batches)
    rounds = sum(max(1, len(batch.rounds)) for batch in batches)
    assert len(watch.calls) == rounds if chunks == 1 else rounds < len(watch.calls) <= chunks * rounds
    # The engine is the policy, which moves
    assert max(watch.differences) <= 1e-5
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(watch.seen, watch.seen[1:], strict=False))
    # So are the log-probabilities of every token that is trained on
    logs = [log for log in tiny.history(trainer) if DIFFERENCE in log]
    assert len(logs) == len(batches) and all(log[DIFFERENCE] < 1e-4 for log in logs)
    if trainer_class is DAPOTrainer:
        assert any(len(batch.rounds) > 1 for batch in batches)
    if trainer_class is DUPOTrainer:
        assert any(batch.selection.sources != [0, 1, 2, 3] for batch in batches)


def test_weights_in_the_engine_are_the_policys(engines, policy, tmp_path):
    """Bit for bit, where vLLM keeps a weight as it is."""
    trainer = built(GRPOTrainer, tmp_path, policy)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    engine, own = (
        dict(weights_of(trainer.vllm_generation.llm).named_parameters()),
        dict(trainer.model.named_parameters()),
    )
    same = [name for name in own if name in engine]
    assert len(same) >= 7
    # vLLM pads the vocabulary
    assert all(torch.equal(own[name], engine[name][: len(own[name])]) for name in same)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.{{}}.weight"
        parts = torch.cat([own[name.format(part)] for part in ("q_proj", "k_proj", "v_proj")])
        assert torch.equal(parts, engine[name.format("qkv_proj")])


def test_refilling_draws_enough_at_once(engines, watched, policy, tmp_path):
    """A round is for all slots that are empty, by the share of groups that were live so far, up to a whole batch."""
    trainer = built(DAPOTrainer, tmp_path, policy, max_steps=6)
    watch = watched(trainer)
    trainer.train()
    size = trainer.num_generations
    calls = iter(watch.calls)
    further = 0
    for batch in trainer.batches:
        assert next(calls) == 4 * size
        live = SOME.targets
        filled = 0
        for number, scored in enumerate(batch.rounds):
            found = sum(rollout.row["target"] in live for rollout in scored.rollouts) // size
            if number:
                drawn = next(calls)
                assert drawn == len(scored.rollouts) and 4 - filled <= drawn / size <= 4
                further += 1
            filled += found
    assert next(calls, None) is None
    assert watch.syncs == 6 < further + 6
    assert trainer.counters.generated_tokens >= trainer.counters.trained_tokens


def add(amount: int) -> str:
    """
    Add to a word.

    Args:
        amount: How much.
    """
    return f"w{10 + amount}"


def test_tools(engines, watched, policy, tmp_path):
    """Completions go on after what a tool wrote, which is masked."""
    arguments = {
        "processing_class": ToolTokenizer.build(),
        "train_dataset": tiny.prompts(conversational=True),
        "tools": [add],
    }
    trainer = built(DUPOTrainer, tmp_path, policy, arguments, max_completion_length=12)
    watch = watched(trainer)
    trainer.train()
    assert max(watch.differences) <= 1e-5
    assert watch.syncs == 2 < len(watch.calls)
    written = [
        (ids, mask)
        for batch in trainer.batches
        for ids, mask in zip(batch.completions, batch.output["tool_mask"].tolist(), strict=True)
        if 0 in mask[: len(ids)]
    ]
    assert written
    for ids, mask in written:
        assert VOCABULARY["w11"] in [token for token, own in zip(ids, mask, strict=False) if not own]
    logs = tiny.history(trainer)
    assert all(log["tools/call_frequency"] > 0 and log[DIFFERENCE] < 1e-4 for log in logs)


@ENDS
def test_completions_end_where_they_are_told(trainer_class, settings, ends, engines, policy, tmp_path):
    trainer = built(trainer_class, tmp_path, policy, max_completion_length=16, **settings)
    trainer.train()
    found = [ids for batch in trainer.batches for ids in batch.completions]
    assert all(not ends & set(ids[:-1]) and (len(ids) == 16 or ids[-1] in ends) for ids in found)
    assert {ids[-1] for ids in found if len(ids) < 16} == ends


def test_a_resumed_run_hands_its_weights_to_the_engine(engines, watched, policy, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    built(GRPOTrainer, tmp_path, policy, **settings).train()
    resumed = built(GRPOTrainer, tmp_path, policy, **settings)
    watch = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert watch.syncs == 1 and watch.differences[0] <= 1e-5


def test_a_look_beside_training_counts_nothing(engines, watched, policy, tmp_path):
    trainer = built(GRPOTrainer, tmp_path, policy)
    watch = watched(trainer)
    trainer.train()
    counted, syncs = trainer.counters.generated_tokens, watch.syncs
    rewards = trainer.roll_out([trainer.train_dataset[i] for i in range(3)], 2, seed=1).rewards
    assert rewards.shape == (3, 2, 1)
    assert watch.calls[-1] == 6 and watch.syncs == syncs + 1  # after the last step
    assert trainer.counters.generated_tokens == counted


# Sleep


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, where engines can sleep")
def test_an_engine_on_a_cpu_does_not_sleep(engines, policy, tmp_path):
    with pytest.raises(ValueError, match=r"(?i)sleep mode is not supported"):
        built(GRPOTrainer, tmp_path, policy, vllm_enable_sleep_mode=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sleep mode needs a GPU: vLLM has none on a CPU")
@pytest.mark.parametrize("vllm_sync", ["weights", "adapter"])
def test_sleep(vllm_sync, engines, watched, policy, tmp_path):
    given = {"use_cpu": False, "vllm_enable_sleep_mode": True, "vllm_sync": vllm_sync}
    trainer = built(DAPOTrainer, tmp_path, policy, {"peft_config": tiny.lora()}, **given)
    watch = watched(trainer)
    trainer.train()
    assert max(watch.differences) <= 1e-4


# An engine whose log-probabilities are not the policy's


@pytest.fixture(scope="module")
def rough_engines():
    """Engines in bfloat16, under a policy in float32."""
    with cpu_engines(dtype="bfloat16") as made:
        yield made


# Bounds that some ratios exceed on each side
BOUNDS = {"vllm_importance_sampling_clip_min": 0.99, "vllm_importance_sampling_clip_max": 1.01}

CORRECTED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "token, truncated": (GRPOTrainer, "token_truncate", {}),
    "token, masked, copied": (DUPOTrainer, "token_mask", {}),
    "sequence, truncated, refilled": (DAPOTrainer, "sequence_truncate", {}),
    "sequence, masked": (GRPOTrainer, "sequence_mask", {}),
    "replayed": (PPOTrainer, "token_truncate", {"num_iterations": 1, "replay_ratio": 0.5, "max_steps": 3}),
}


@dataclass
class Recorded:
    """
    An engine's answers, once for real and then again in the same order, and the random state after each: an engine in
    the same process draws from the trainer's.
    """

    answers: list[tuple[Any, Any, torch.Tensor]] = field(default_factory=list)
    asked: int = 0
    again: bool = False

    def between(self, generation: Any) -> None:
        generate = generation.generate

        def recorded(prompts: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.again:
                answer = generate(prompts, *args, **kwargs)
                self.answers.append((prompts, answer, torch.get_rng_state()))
                return answer
            self.asked += 1
            before, answer, state = self.answers[self.asked - 1]
            assert before == prompts
            torch.set_rng_state(state)
            return answer

        generation.generate = recorded


@pytest.mark.parametrize("case", CORRECTED)
def test_every_row_has_its_own_correction(case, rough_engines, policy, tmp_path):
    """On the same rollouts, fitted micro-batches and shared prompts give the gradient of TRL's micro-batches."""
    trainer_class, mode, settings = CORRECTED[case]
    record, vectors, trainers = Recorded(), [], []
    for plain in (True, False):
        gradients, record.again = Gradients(), not plain
        sharing = {"fit_micro_batches": False, "share_prefixes": False} if plain else {"share_prefixes": "always"}
        given = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": mode, **BOUNDS, **SGD}
        trainer = built(trainer_class, tmp_path, policy, {"callbacks": [gradients]}, **given, **sharing, **settings)
        record.between(trainer.vllm_generation)
        trainer.train()
        vectors.append(gradients.vectors)
        trainers.append(trainer)
    assert record.asked == len(record.answers)
    assert largest_relative_error(*vectors) <= 1e-5
    trainer = trainers[1]
    assert trainer.saved_compute.regrouped_rows > 0
    assert trainer.sharing.token_slots < trainer.sharing.token_slots_unshared
    # The engine is rough, and the bounds are felt
    assert all(log[DIFFERENCE] > 1e-3 for log in tiny.history(trainer) if DIFFERENCE in log)
    ratios = torch.cat([batch["importance_sampling_ratio"].flatten() for batch in trainer.losses])
    ends = torch.tensor([0.0] if "mask" in mode else [0.99, 1.01])
    assert torch.isin(ratios, ends).any() and ((ratios != 1) & ~torch.isin(ratios, ends)).any()
