"""
What is refused about `vllm_sync="adapter"`, before a model is loaded: the model's name belongs to no model. What it
does is tested with real engines, in `tests/vllm_engine/`.
"""

from typing import Any

import pytest
import tiny
from peft import IA3Config, get_peft_model

from trl_ext import GRPOConfig, GRPOTrainer


COLOCATED = {"use_vllm": True, "vllm_mode": "colocate", "vllm_sync": "adapter"}

CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown value": ({"vllm_sync": "lora"}, ["vllm_sync='lora'", "'weights'", "'adapter'"]),
    "without vLLM": ({"use_vllm": False}, ["has no effect without vLLM", "use_vllm=True"]),
    "a server": ({"vllm_mode": "server"}, ["vllm_mode='colocate'", "vllm_sync='weights'"]),
    "a revision": ({"model_init_kwargs": {"revision": "v2"}}, ["revision", "vllm_sync='weights'"]),
}

POLICIES: dict[str, tuple[Any, list[str]]] = {
    "all weights": (dict, ["trains all weights", "peft_config"]),
    "a model in memory": (
        lambda: {"model": tiny.stopping(), "peft_config": tiny.lora()},
        ["may have changed", "save_pretrained"],
    ),
    "no LoRA": (
        lambda: {"peft_config": IA3Config(target_modules=["q_proj"], feedforward_modules=[])},
        ["is for LoRA", "IA3"],
    ),
    "no LoRA, in memory": (
        lambda: {
            "model": get_peft_model(tiny.stopping(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        },
        ["is for LoRA", "IA3"],
    ),
    "DoRA": (lambda: {"peft_config": tiny.lora(use_dora=True)}, ["use_dora=True", "vLLM has no DoRA"]),
    "biases": (lambda: {"peft_config": tiny.lora(bias="all")}, ["bias='all'"]),
    "whole modules": (
        lambda: {"peft_config": tiny.lora(modules_to_save=["lm_head"])},
        ["modules_to_save=['lm_head']"],
    ),
    "tokens": (lambda: {"peft_config": tiny.lora(trainable_token_indices=[3])}, ["trainable_token_indices=[3]"]),
    "ranks": (lambda: {"peft_config": tiny.lora(rank_pattern={"q_proj": 2})}, ["rank_pattern", "alike"]),
    "scales": (lambda: {"peft_config": tiny.lora(alpha_pattern={"q_proj": 2})}, ["alpha_pattern", "alike"]),
    "another base": (lambda: {"peft_config": tiny.lora(init_lora_weights="pissa")}, ["'pissa'", "changes the base"]),
    "a rank that is too large": (lambda: {"peft_config": tiny.lora(r=513)}, ["r=513", "up to 512"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refused_by_the_configuration(case, tmp_path):
    changed, told = CONFIGS[case]
    with pytest.raises(ValueError) as error:
        GRPOConfig(**tiny.cpu_settings(tmp_path, **{**COLOCATED, **changed}))
    assert all(part in str(error.value) for part in told), error.value


@pytest.mark.parametrize("case", POLICIES)
def test_refused_policies(case, tmp_path):
    arguments, told = POLICIES[case]
    with pytest.raises(ValueError) as error:
        tiny.trainer(GRPOTrainer, tmp_path, arguments={"model": "no-one/no-model", **arguments()}, **COLOCATED)
    assert all(part in str(error.value) for part in told), error.value


def test_what_is_right_goes_on_to_the_model(tmp_path):
    arguments = {"model": "no-one/no-model", "peft_config": tiny.lora(use_rslora=True, target_modules="all-linear")}
    with pytest.raises(OSError):
        tiny.trainer(GRPOTrainer, tmp_path, arguments=arguments, **COLOCATED)
