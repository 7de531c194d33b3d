"""Reward models that are adapters: read, put on a policy's base, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trl_ext.roles.reward_adapter import RewardAdapter, check_has_head, is_adapter, without_reward_adapters


IDS = torch.tensor([[5, 9, 11, 4, 20]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(tiny.reward_adapter(tmp_path_factory.mktemp("reward_adapter")))


def policy(folder: Path, **overrides: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    return get_peft_model(model, tiny.lora(**overrides))


def copied(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """The adapter with other entries in its configuration."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    saved = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(saved | config))
    return other


def with_weights(folder: Path, change: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return folder


def test_the_policy_computes_what_it_did(folder):
    model = policy(folder)
    before, trained = model(IDS).logits, [n for n, w in model.named_parameters() if w.requires_grad]
    RewardAdapter(folder).add_to(model)
    assert torch.equal(model(IDS).logits, before)
    assert [n for n, w in model.named_parameters() if w.requires_grad] == trained
    assert list(model.active_adapters) == ["default"]
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(folder.parent / "base")(IDS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 7},
        {"use_rslora": True, "lora_alpha": 5},
        {"use_dora": True},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
    ],
    ids=str,
)
def test_what_was_trained_is_what_the_policy_gets(settings, tmp_path):
    folder = Path(tiny.reward_adapter(tmp_path, **settings))
    model = policy(folder)
    RewardAdapter(folder).add_to(model, "judge")
    saved = {n: w for n, w in load_file(folder / "adapter_model.safetensors").items() if ".score." not in n}
    weights = {n.replace(".judge", ""): w for n, w in model.named_parameters() if ".judge" in n}
    weights = {n.removesuffix(".weight") if "magnitude" in n else n: w for n, w in weights.items()}
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    mine, theirs = model.peft_config["judge"], LoraConfig.from_pretrained(folder)
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern"):
        assert getattr(mine, name) == getattr(theirs, name)


def test_it_is_not_saved_with_the_policy(folder, tmp_path):
    model = policy(folder)
    RewardAdapter(folder).add_to(model)
    with without_reward_adapters(model):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "reward").exists()
    assert list(model.peft_config) == ["default", "reward"]
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "reward" in name]
    with without_reward_adapters(tiny.qwen2()):  # no PEFT: nothing to do
        pass


def test_the_same_adapter_again_is_there_already(folder):
    model = policy(folder)
    for _ in range(2):  # of two trainers of one model, one after the other
        RewardAdapter(folder).add_to(model)
    assert list(model.peft_config) == ["default", "reward"]


def test_a_name_that_is_taken(folder):
    with pytest.raises(ValueError, match=r"in .*reward, on the base .*base', would be 'default'.*adapter='another"):
        RewardAdapter(folder).add_to(policy(folder), "default")


def test_a_base_that_is_trained(folder):
    model = policy(folder)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"relies on the policy's base, and 1 weights of it are trained.*Freeze them"):
        RewardAdapter(folder).add_to(model)
    with pytest.raises(ValueError, match="bias='none'"):
        RewardAdapter(folder).add_to(policy_with_biases(folder))


def policy_with_biases(folder: Path) -> Any:
    return policy(folder, bias="all")


def test_a_policy_with_another_kind_of_adapter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    model = get_peft_model(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"can't be loaded beside the policy's adapter: Cannot combine.*of its own"):
        RewardAdapter(folder).add_to(model)


def test_another_shape(folder):
    model = get_peft_model(tiny.qwen2(intermediate_size=48), tiny.lora())
    with pytest.raises(ValueError, match=r"is not of the policy's shape: (?s:.*)size mismatch"):
        RewardAdapter(folder).add_to(model)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"hidden_size": 32},
            r"reads hidden states of size 16, and those of the policy's base 'mine' have 32\. Train",
        ),
        ({"vocab_size": 30}, r"learned with 24 tokens in its vocabulary, and the policy's base 'mine' has 30\. Train"),
        ({"num_hidden_layers": 3}, r"learned with 2 layers, and the policy's base 'mine' has 3\. Train"),
        ({}, r"was trained on another base than the policy's, 'mine'\. Train.*base_model_name_or_path"),
    ],
    ids=str,
)
def test_another_base(base, message, folder):
    adapter = RewardAdapter(folder)
    with pytest.raises(ValueError, match=rf"reward, on the base '.*base', {message}"):
        adapter.check_base(tiny.qwen2(**base).config, "mine")


def test_a_base_by_another_name(folder, monkeypatch):
    adapter, config = RewardAdapter(folder), tiny.qwen2().config
    adapter.check_base(config, "mine", check_name=False)
    adapter.check_base(config, "")  # in memory: nothing to compare
    adapter.check_base(config, str(folder.parent / "reward/../base"))
    monkeypatch.chdir(folder.parent)
    adapter.check_base(config, "base")


def test_a_base_that_is_gone(folder, tmp_path):
    adapter = RewardAdapter(copied(folder, tmp_path, base_model_name_or_path="/gone"))
    adapter.check_base(tiny.qwen2(vocab_size=30).config, "/gone")  # all that is known agrees
    with pytest.raises(ValueError, match="on the base '/gone', reads hidden states of size 16"):
        adapter.check_base(tiny.qwen2(hidden_size=32).config, "/gone")


def test_an_adapter_without_a_head(folder, tmp_path):
    other = with_weights(copied(folder, tmp_path), lambda weights: weights.pop("base_model.model.score.weight"))
    for read in (RewardAdapter, check_has_head):
        with pytest.raises(
            ValueError, match=r"in .*other, on the base '.*base', has no score head.*recipes/reward.py"
        ):
            read(str(other))


def test_a_head_with_two_outputs(tmp_path):
    with pytest.raises(ValueError, match=r"has a head with 2 outputs.*num_labels=1"):
        RewardAdapter(tiny.reward_adapter(tmp_path, num_labels=2))


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens"]}, {"bias": "all"}, {"trainable_token_indices": [3]}], ids=str
)
def test_more_of_the_base_than_the_head_was_trained(settings, tmp_path):
    with pytest.raises(ValueError, match=r"has more than its LoRA and its head.*Train it without"):
        RewardAdapter(tiny.reward_adapter(tmp_path, **settings))


def test_other_files(folder, tmp_path):
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base"):
        RewardAdapter(copied(folder, tmp_path, init_lora_weights="pissa"))
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has 1 weights that are neither LoRA's nor the head's, such as 'x'"):
        RewardAdapter(
            with_weights(copied(folder, tmp_path), lambda weights: weights.update(x=torch.zeros(1)))  # type: ignore[func-returns-value]
        )
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        RewardAdapter(tmp_path)
    model = get_peft_model(
        tiny.classifier(), IA3Config(task_type="SEQ_CLS", target_modules=["q_proj"], feedforward_modules=[])
    )
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="is of the type IA3, and only LoRA"):
        RewardAdapter(tmp_path / "ia3")
    assert is_adapter(folder) and not is_adapter(folder.parent / "base") and not is_adapter(print)
