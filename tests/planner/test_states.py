"""What persists, against the storages of real trainers."""

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from planner.jobs import SHAPE, job, layout
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_ext import DPOConfig, DPOTrainer, GRPOTrainer, PPOTrainer
from trl_ext.planner.models import count_numbers
from trl_ext.planner.states import held_states
from trl_ext.roles.critic import CRITICS, base_model_of, critic_of


def nbytes(tensors: Any) -> int:
    """Of the storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Held(TrainerCallback):
    """Bytes by role after a step, before its gradients are freed."""

    trainer: Any
    found: dict[str, int]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        policy, optimizer = self.trainer.model, self.trainer.optimizer
        critic = critic_of(policy)
        own = (
            set()
            if critic is None
            else {id(weight) for weight in (*critic.trained_parameters(), *critic.parameters())}
        )
        roles: dict[str, list[Any]] = {"base weights": [], "adapter": [], "critic": []}
        for name, weight in policy.named_parameters():
            role = "critic" if id(weight) in own else "adapter" if "lora_" in name else "base weights"
            roles[role].append(weight.data)
            quantized = getattr(weight, "quant_state", None)
            if quantized is not None:
                nested = quantized.state2
                roles[role] += [quantized.absmax, *([] if nested is None else [nested.absmax])]
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        roles["gradients"] = [weight.grad for weight in trained if weight.grad is not None]
        states = (state for kept in optimizer.state.values() for name, state in kept.items() if name != "step")
        roles["optimizer"] = [state for state in states if isinstance(state, torch.Tensor)]
        self.found = {role: nbytes(tensors) for role, tensors in roles.items()}


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def trained(trainer_class: Any, tmp_path: Any, model: Any, peft_config: Any, **settings: Any) -> dict[str, int]:
    held = Held()
    given = {"model": model, "peft_config": peft_config, "callbacks": [held]}
    if trainer_class is DPOTrainer:
        rows = [{"prompt": f"w{i} w1", "chosen": " w2", "rejected": " w3 w4"} for i in range(16)]
        args = DPOConfig(**tiny.pair_settings(tmp_path, max_steps=1))
        data = tiny.Dataset.from_list(rows)
        trainer: Any = DPOTrainer(args=args, processing_class=tiny.tokenizer(), train_dataset=data, **given)
    else:
        trainer = tiny.trainer(trainer_class, tmp_path, tiny.hashed, given, max_steps=1, **settings)
    held.trainer = trainer
    trainer.train()
    return held.found


def model(tmp_path: Any, quantization: str | None) -> Any:
    made = tiny.qwen2(**SHAPE, initializer_range=0.2)
    if quantization is None:
        return made
    made.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=tiny.nf4(quantization == "4bit_nested")
    )


CASES = [
    *(("ppo", critic, 4, None) for critic in CRITICS),
    ("ppo", "head", 0, None),
    ("ppo", "model", 0, None),
    ("ppo", "head", 4, "4bit"),
    ("ppo", "head", 4, "4bit_nested"),
    ("grpo", None, 4, None),
    ("grpo", None, 0, None),
    ("dpo", None, 4, None),
]
TRAINERS = {"ppo": PPOTrainer, "grpo": GRPOTrainer, "dpo": DPOTrainer}


@pytest.mark.parametrize(("method", "critic", "lora_r", "quantization"), CASES)
def test_held_bytes_are_those_of_a_real_trainer(tmp_path, method, critic, lora_r, quantization):
    """Within 2 %, and 5 % for each part. What a CPU has in float32 is planned so, too."""
    settings = {} if critic is None else {"critic": critic}
    found = trained(TRAINERS[method], tmp_path, model(tmp_path, quantization), lora() if lora_r else None, **settings)
    planned = job(
        method,
        critic=critic,
        reference=None,
        lora_r=lora_r,
        quantization=quantization,
        dtype="float32",
    )
    states = held_states(planned, count_numbers(planned)).gpu
    for name, size in found.items():
        assert states.get(name, 0.0) == pytest.approx(size, rel=0.05), name
    assert sum(states.values()) == pytest.approx(sum(found.values()), rel=0.02)


def test_what_is_spread_is_a_part_of_it():
    """ZeRO-3 on four GPUs: a quarter of everything; ZeRO-2 leaves the weights; DeepSpeed adds a copy in float32."""
    numbers = count_numbers(job())
    zero2, zero3 = (held_states(job(strategy=name, layout=layout(4)), numbers).gpu for name in ("zero2", "zero3"))
    assert zero2["base weights"] == 4 * zero3["base weights"] == 2 * numbers.base
    trained = numbers.adapter + numbers.critic
    assert zero2["optimizer"] == zero3["optimizer"] == 12 * trained / 4
    assert zero2["gradients"] == zero3["gradients"] == 2 * trained / 4


def test_what_is_spread_of_a_base_in_4_bits():
    """DeepSpeed spreads the integers, FSDP2 what isn't quantized alone; every GPU has the constants."""
    numbers = count_numbers(job())
    held = {
        name: held_states(job(strategy=name, quantization="4bit", layout=layout(2)), numbers).gpu["base weights"]
        for name in ("ddp", "zero3", "fsdp2")
    }
    constants, integers, other = numbers.linear / 64 * 4, numbers.linear / 2, 2 * numbers.other
    assert held["ddp"] == constants + integers + other
    assert held["zero3"] == constants + (integers + other) / 2
    assert held["fsdp2"] == constants + integers + other / 2


def test_what_is_trained_under_fsdp2_is_in_float32():
    """Heads, adapters and models as critics, with their gradients and states; all halved on two GPUs."""
    spread = {"strategy": "fsdp2", "layout": layout(2)}
    numbers = count_numbers(job(critic="model"))
    held = held_states(job(critic="model", **spread), numbers).gpu
    trained = numbers.adapter + numbers.critic
    assert held["critic"] == 4 * numbers.critic / 2 and held["base weights"] == 2 * numbers.base / 2
    assert held["gradients"] == 4 * trained / 2 and held["optimizer"] == 8 * trained / 2


def test_rewards_and_references_are_held_as_they_are_loaded():
    """A reward adapter in float32, PEFT's; models as the policy is loaded, which DeepSpeed casts."""
    of_adapter = count_numbers(job(reward="adapter"))
    assert held_states(job(reward="adapter"), of_adapter).gpu["reward"] == 4 * of_adapter.reward
    models = {"lora_r": 0, "reward": "model", "reference": "model"}
    numbers = count_numbers(job(**models))
    for strategy, size, share in (("none", 4, 1), ("fsdp2", 4, 2), ("zero3", 2, 2)):
        gpus = layout(1 if strategy == "none" else 2)
        held = held_states(job(**models, strategy=strategy, layout=gpus), numbers).gpu
        assert held["reference"] == size * numbers.base / share
        # Nothing spreads a reward model under FSDP2
        assert held["reward"] == size * numbers.reward / (1 if strategy == "fsdp2" else share)
    assert held_states(job(reward="model"), numbers).gpu["reward"] == 2 * numbers.reward


def test_offload_moves_the_optimizer_to_the_host():
    full = job("dpo", lora_r=0, reference="model", strategy="zero3", layout=layout(4), offload="optimizer")
    numbers = count_numbers(full)
    states = held_states(full, numbers)
    assert "optimizer" not in states.gpu and "gradients" not in states.gpu
    assert states.host == {"optimizer": 12 * numbers.base, "gradients": 6 * numbers.base}


def test_the_base_is_reached_through_the_adapter():
    """What the planner takes for the base is what PEFT was put on."""
    made = tiny.qwen2(**SHAPE)
    assert count_numbers(job()).base == sum(weight.numel() for weight in base_model_of(made).parameters())
