"""
`vllm_sync="adapter"`: a colocated engine gets the adapter alone, and is the policy after each step all the same.
"""

from typing import Any

import pytest
import tiny
import torch
from engines.test_vllm import DIFFERENCE, built
from vllm_engine.cpu_engine import weights_of

from trl_ext import DAPOTrainer, DUPOTrainer, GRPOTrainer, PPOTrainer


pytestmark = pytest.mark.train

PPO = {"num_iterations": 1}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "GRPO": (GRPOTrainer, {}, {}),
    "α, and a rank between vLLM's": (GRPOTrainer, {}, {"r": 12, "lora_alpha": 5, "target_modules": "all-linear"}),
    "rsLoRA": (GRPOTrainer, {}, {"use_rslora": True, "lora_alpha": 3}),
    "an adapter without effect at first": (GRPOTrainer, {}, {"init_lora_weights": True}),
    "a reference": (GRPOTrainer, {"beta": 0.1}, {}),
    "DAPO": (DAPOTrainer, {"rewards_in_flight": 2, "generation_chunks": 2}, {}),
    "DUPO": (DUPOTrainer, {}, {}),
    "PPO, head": (PPOTrainer, PPO, {}),
    "PPO, model": (PPOTrainer, {**PPO, "critic": "model"}, {}),
    "PPO, adapter": (PPOTrainer, {**PPO, "critic": "adapter"}, {}),
}


def refuse(weights: Any) -> None:
    raise AssertionError("weights of the base were sent")


@pytest.mark.parametrize("case", CASES)
def test_the_engine_is_the_policy(case, engines, watched, policy, tmp_path, monkeypatch):
    trainer_class, settings, adapter = CASES[case]
    arguments = {"peft_config": tiny.lora(**adapter)}
    trainer = built(trainer_class, tmp_path, policy, arguments, vllm_sync="adapter", **settings)
    watch, engine = watched(trainer), weights_of(trainer.vllm_generation.llm)
    monkeypatch.setattr(engine, "load_weights", refuse)
    monkeypatch.setattr(trainer.model, "merge_adapter", refuse)
    held = tiny.weights(engine)
    trainer.train()
    assert watch.syncs == len(trainer.batches) == 2
    assert max(watch.differences) <= 1e-5
    assert (watch.seen[0] - watch.seen[1]).abs().max() > 1e-4
    assert all(log[DIFFERENCE] < 1e-4 for log in tiny.history(trainer))
    base = [name for name in held if "lora" not in name]
    assert len(base) >= 10 and all(torch.equal(held[name], engine.state_dict()[name]) for name in base)


def test_a_policy_that_has_an_adapter_already(engines, watched, policy, tmp_path):
    """The engine gets the adapter that is trained, whatever its name."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), tiny.lora(), adapter_name="mine")
    trainer = built(GRPOTrainer, tmp_path, policy, {"model": model}, vllm_sync="adapter")
    watch = watched(trainer)
    trainer.train()
    assert watch.syncs == 2 and max(watch.differences) <= 1e-5


def test_a_resumed_run_hands_its_adapter_to_the_engine(engines, watched, policy, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "vllm_sync": "adapter"}
    built(GRPOTrainer, tmp_path, policy, {"peft_config": tiny.lora()}, **settings).train()
    resumed = built(GRPOTrainer, tmp_path, policy, {"peft_config": tiny.lora()}, **settings)
    watch = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert watch.syncs == 1 and watch.differences[0] <= 1e-5
