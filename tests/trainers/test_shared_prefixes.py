"""
Passes that share prompts, in trainers: PPO with each critic against itself without sharing, DPO against TRL's, and
what is not shared. (`test_fit.py` has every loss of GRPO.)
"""

from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import Gradients, largest_relative_error
from datasets import Dataset
from peft import get_peft_model

import trl_ext
from trl_ext.rollouts.pair_dealing import WHOLE_BATCH_LOSSES
from trl_ext.rollouts.prefix_exactness import Window, attention_window, common_window, pass_cost, sharing_obstacles
from trl_ext.rollouts.shared_pass import SharedPass


TOLERANCE = 1e-5


def text(seed: int, words: int) -> str:
    return " ".join(tiny.WORDS[(seed * 7 + i * 3) % 20] for i in range(words))


def documents() -> Dataset:
    """Prompts of 9 to 15 words."""
    return Dataset.from_dict({"prompt": [text(i, 9 + i % 7) for i in range(32)]})


def steps(**settings: Any) -> dict[str, Any]:
    """Three optimizer steps by SGD."""
    return {
        "optim": "sgd",
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        **settings,
    }


# PPO

PPO: dict[str, dict[str, Any]] = {
    "head": {"critic": "head"},
    # With seed 7, the sums of its gradient nearly cancel: rounding alone makes 1.2e-5
    "head_that_trains_the_trunk": {"critic": "head", "critic_head": "mlp", "critic_trunk_grad": 0.5, "seed": 8},
    "model": {"critic": "model"},
    "lora_checkpointing": {"adapted": True, "gradient_checkpointing": True},
    "adapter": {"critic": "adapter", "adapted": True},
    "adapter_checkpointing": {"critic": "adapter", "adapted": True, "gradient_checkpointing": True},
    "kl_in_the_loss": {"beta": 0.1, "kl_coef": 0.0},
    "one_pass_for_old_policy_and_loss": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
}


def ppo(tmp_path: Any, share: Any, adapted: bool = False, **settings: Any) -> tuple[Any, list[torch.Tensor]]:
    gradients = Gradients()
    given = steps(**{"critic_learning_rate": 1e-3, "max_completion_length": 10, "share_prefixes": share, **settings})
    trainer = trl_ext.PPOTrainer(
        model=tiny.stopping(),
        reward_funcs=tiny.first_token_even,
        args=trl_ext.PPOConfig(**tiny.cpu_settings(tmp_path, **given)),
        train_dataset=documents(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
        peft_config=tiny.lora() if adapted else None,
    )
    trainer.train()
    return trainer, gradients.vectors


@pytest.mark.train
@pytest.mark.parametrize("name", PPO)
def test_ppo(name, tmp_path):
    plain, theirs = ppo(tmp_path / "plain", False, **PPO[name])
    shared, ours = ppo(tmp_path / "shared", "always", **PPO[name])
    assert largest_relative_error(ours, theirs) <= TOLERANCE
    assert plain.sharing is None
    assert shared.sharing.packed_passes + shared.sharing.cached_passes > 0
    assert shared.sharing.token_slots < 0.8 * shared.sharing.token_slots_unshared
    assert shared.sharing.cache == (PPO[name].get("critic", "head") == "head")  # others would miss the prompt


# DPO

LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
DPO: dict[str, dict[str, Any]] = {name: {"loss_type": [name]} for name in LOSSES}
DPO["robust"]["label_smoothing"] = DPO["exo_pair"]["label_smoothing"] = 0.1
DPO |= {
    "lora_checkpointing": {"adapted": True, "gradient_checkpointing": True},
    "references_first": {"precompute_ref_log_probs": True},
    "weighted": {"use_weighting": True},
    "length_desensitized": {"ld_alpha": 0.5},
}


def pairs() -> Dataset:
    """Two pairs of each prompt, answers of 1 to 6 words."""
    return Dataset.from_dict(
        {
            "prompt": [f"{text(i // 2, 6 + (i // 2) % 5)} " for i in range(16)],
            "chosen": [text(i + 3, 1 + i % 5) for i in range(16)],
            "rejected": [text(i + 11, 1 + (i * 3) % 6) for i in range(16)],
        }
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tiny.stopping().save_pretrained(path)
    return str(path)


def dpo(side: Any, policy: str, tmp_path: Any, adapted: bool = False, **settings: Any) -> Any:
    gradients, model = Gradients(), policy
    if adapted:  # it comes with its adapter, of which TRL, too, keeps a copy for the reference
        torch.manual_seed(4)
        model = get_peft_model(tiny.stopping(), tiny.lora())
    trainer = side.DPOTrainer(
        model=model,
        args=side.DPOConfig(**tiny.pair_settings(tmp_path, **steps(**settings))),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.vectors


@pytest.mark.train
@pytest.mark.parametrize("name", DPO)
def test_dpo(name, policy, tmp_path):
    case = {"max_steps": 2, **DPO[name]}
    plain, theirs = dpo(trl, policy, tmp_path / "theirs", **case)
    trainer, ours = dpo(trl_ext, policy, tmp_path / "ours", share_prefixes="always", **case)
    assert largest_relative_error(ours, theirs) <= TOLERANCE
    assert trainer.sharing.packed_passes == trainer.sharing.passes > 0
    assert trainer.sharing.token_slots < 0.8 * trainer.sharing.token_slots_unshared
    deals = name not in WHOLE_BATCH_LOSSES
    assert trainer.sharing.dealt_steps == (2 if deals else 0)
    assert trainer.sharing.met_pairs == (2 * 8 if deals else 0)  # a step has two pairs of each of 8 prompts
    # Means over the pairs of a step; sums over the tokens of a micro-batch divided by their number
    keys = {"loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/margins"}
    keys |= {"num_tokens"} if deals else {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    for mine, other in zip(tiny.history(trainer), tiny.history(plain), strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key


def test_afterwards_the_models_forward_is_trls(policy, tmp_path):
    trainer, _ = dpo(trl_ext, policy, tmp_path, max_steps=1, share_prefixes="always")
    for model in (trainer.model, trainer.ref_model):
        assert not isinstance(model.forward, SharedPass)


# What is not shared


def test_switched_off(policy, tmp_path):
    trainer, _ = dpo(trl_ext, policy, tmp_path, max_steps=1, share_prefixes=False)
    assert trainer.sharing is None


def test_values_of_the_setting(tmp_path):
    with pytest.raises(ValueError, match=r"share_prefixes='sometimes'"):
        trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path, share_prefixes="sometimes"))
    with pytest.raises(ValueError, match=r"fit_micro_batches=False"):
        trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path, share_prefixes="always", fit_micro_batches=False))


def test_dropout_of_an_adapter_is_named_in_one_line(tmp_path, caplog):
    trainer = trl_ext.GRPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.first_token_even,
        args=trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path, share_prefixes=True)),
        train_dataset=documents(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(lora_dropout=0.05),
    )
    assert not trainer.sharing.pack and not trainer.sharing.cache
    assert caplog.text.count("lora_dropout=0") == 1


def test_dpo_says_it_too(tmp_path, caplog):
    trainer = trl_ext.DPOTrainer(
        model=tiny.qwen2(),
        args=trl_ext.DPOConfig(**tiny.pair_settings(tmp_path)),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(lora_dropout=0.05),
    )
    assert not trainer.sharing.pack
    assert caplog.text.count("lora_dropout=0") == 1


def test_what_stands_in_the_way(subtests):
    cases = {
        "absolute": (tiny.gpt2(), "sdpa"),
        "dropout": (tiny.qwen2(attention_dropout=0.1), "sdpa"),
        "takes no mask": (tiny.qwen2(), "flash_attention_2"),
    }
    for told, (model, attention) in cases.items():
        with subtests.test(told):
            assert any(told in obstacle for obstacle in sharing_obstacles(model, attention))
    assert sharing_obstacles(tiny.qwen2(), "sdpa") == []


def test_a_window_is_that_of_layers_that_have_one():
    assert attention_window(tiny.qwen2()) is None
    sliding = tiny.qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert attention_window(sliding) == Window(8, "by_layer_type")


def test_models_that_get_the_same_mask_have_the_same_window():
    """Otherwise no mask is right for all of them, and rows longer than the shortest window are not shared."""
    short, long = (tiny.qwen2(use_sliding_window=True, sliding_window=n, max_window_layers=1) for n in (8, 9))
    assert common_window([short, short]) == Window(8, "by_layer_type")
    assert common_window([tiny.qwen2(), long, short]) == Window(8)
    assert common_window([tiny.qwen2()]) is None


def test_the_cost_of_attention_by_hand():
    """Two layers of 2 heads of 8 numbers, a query's product and a weighted value; 2 · 2320 weights, 1.5 on a CPU."""
    model = tiny.qwen2()
    weights = sum(p.numel() for name, p in model.model.named_parameters() if "embed" not in name)
    assert pass_cost(model, "cpu").pair == pytest.approx(1.5 * 2 * 2 * 2 * 8 / weights)
