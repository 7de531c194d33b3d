"""A critic that is an adapter on the policy's base: its values, its gradient, and what it leaves alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from comparing import relative_error
from peft import IA3Config, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from roles.test_switching import CHECKPOINTING, four_bit
from trl_ext import PPOConfig, PPOTrainer, load_critic
from trl_ext.roles.critic import critic_of, logps_and_values, without_critic
from trl_ext.roles.switching import using_adapter


IDS = torch.tensor([[5, 9, 4, 17, 8, 2], [7, 7, 11, 20, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def lora(**settings: Any) -> Any:
    return tiny.lora(task_type="CAUSAL_LM", **settings)


def built(folder: Path, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    """PPO with a critic that says something: neither its B nor its head is zero."""
    given = {"num_generations": 1, "per_device_train_batch_size": 4, "num_iterations": 1, "critic": "adapter"}
    arguments = {"peft_config": lora()} if arguments is None else arguments
    trainer = tiny.trainer(PPOTrainer, folder, tiny.hashed, arguments, **{**given, **settings})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in trainer.critic.trained_parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return trainer


def of_critic(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if "critic" in name.split(".")}


# Values


def test_it_starts_without_effect_on_the_base_and_as_the_policys_adapter(tmp_path):
    config = lora(r=4, lora_alpha=6, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2}, use_rslora=True)
    arguments = {"model": tiny.qwen2(tie_word_embeddings=False), "peft_config": config}
    trainer = tiny.trainer(
        PPOTrainer,
        tmp_path,
        tiny.hashed,
        arguments,
        critic="adapter",
        num_generations=1,
        per_device_train_batch_size=4,
    )
    own = trainer.model.peft_config["critic"]
    assert (own.r, own.lora_alpha, own.target_modules, own.use_rslora) == (4, 6, config.target_modules, True)
    assert own.rank_pattern == {"q_proj": 2} and not own.modules_to_save
    assert trainer.model.active_adapters == ["default"]
    assert not any(weight.any() for name, weight in of_critic(trainer.model).items() if "lora_B" in name)
    assert not logps_and_values(trainer.model, IDS, MASK)[1].any()


def test_settings_of_its_own(tmp_path):
    config = lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    trainer = built(tmp_path, {"peft_config": config}, critic_lora_r=6, critic_lora_alpha=9, critic_head="mlp")
    own = trainer.model.peft_config["critic"]
    assert (own.r, own.lora_alpha, own.rank_pattern, own.alpha_pattern) == (6, 9, {}, {})
    assert {len(w) for name, w in of_critic(trainer.model).items() if "lora_A" in name} == {6}
    assert trainer.critic.head.dense is not None


def test_values_are_those_of_the_adapter_alone(tmp_path):
    trainer = built(tmp_path)
    policy = trainer.model.eval()
    with torch.no_grad():
        logps, values = logps_and_values(policy, IDS, MASK)
        alone = copy.deepcopy(policy)
        alone.set_adapter("critic")
        hidden = alone.get_base_model().model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        expected = (hidden @ trainer.critic.head.out.weight.T + trainer.critic.head.out.bias).squeeze(-1)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
        assert values.std() > 0.1 and values.dtype == torch.float32
        # Neither what the policy says, nor its generation, knows of it
        alone.set_adapter("default")
        critic_of(alone).active = False
        labels = IDS.masked_fill(MASK == 0, -100)
        plain = alone(input_ids=IDS, attention_mask=MASK, labels=labels, fused_lm_head=True)
        assert torch.equal(logps, plain.log_probs)
    assert policy.active_adapters == ["default"]


def test_a_critic_may_be_asked_inside_the_context_of_its_actor(tmp_path):
    policy = built(tmp_path).model.eval()
    expected = logps_and_values(policy, IDS, MASK)
    with using_adapter(policy, "default"):
        found = logps_and_values(policy, IDS, MASK)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# Gradients


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("quantized", [False, True])
def test_each_role_has_the_gradient_that_it_has_alone(checkpointing, quantized, tmp_path):
    """With one backward pass through both, and B ≠ 0."""
    arguments = {"peft_config": lora()}
    if quantized:
        arguments["model"] = four_bit(tmp_path / "base")
    model = built(tmp_path / "run", arguments).model
    if quantized:  # in bfloat16, rounding is all that could be compared
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data

    def losses() -> list[torch.Tensor]:
        logps, values = logps_and_values(model, IDS, MASK)
        return [(logps.square() * MASK[:, 1:]).sum(), ((values - 0.3).square() * MASK).sum()]

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        return found

    losses()[0].backward()
    actor = gradients()
    assert not any("critic" in name.split(".") for name in actor)
    losses()[1].backward()
    critic = gradients()
    assert critic.keys() == of_critic(model).keys() and len(critic) == 10
    assert all(gradient.any() for gradient in critic.values())
    # The same adapter as the only one that is active
    twin = copy.deepcopy(model)
    head = twin.get_base_model().critic.head
    twin.set_adapter("critic")
    hidden = twin.get_base_model().model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    ((head(hidden) - 0.3).square() * MASK).sum().backward()
    for name, weight in twin.named_parameters():
        if name in critic:
            torch.testing.assert_close(critic[name], weight.grad, rtol=1e-5, atol=1e-6)
    model.train()
    if CHECKPOINTING[checkpointing] is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
    sum(losses()).backward()
    together = gradients()
    assert together.keys() == actor.keys() | critic.keys()
    for name, gradient in (actor | critic).items():
        assert relative_error(together[name], gradient) < 1e-5, name


@pytest.mark.train
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"beta": 0.1, "kl_coef": 0.0}], ids=str)
def test_training_it_changes_nothing_else_by_a_bit(settings, tmp_path):
    """Actor, reference and a reward on the same base, with several switches to the reference in between."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.stopping(), lora())
    model.add_adapter("reward", lora(target_modules=["k_proj", "v_proj"]))
    trainer = built(
        tmp_path, {"model": model}, value_updates_per_policy_update=5, max_steps=4, entropy_coef=0.01, **settings
    )

    @torch.no_grad()
    def said() -> dict[str | None, torch.Tensor]:
        found = {}
        for adapter in ("default", "reward", "ref", None):
            with using_adapter(trainer.model, adapter):
                found[adapter] = trainer.model.eval()(IDS).logits
        return found

    before, weights = said(), tiny.weights(trainer.model)
    trainer.train()
    after = said()
    assert all(torch.equal(after[adapter], logits) for adapter, logits in before.items())
    moved = {name for name, value in tiny.weights(trainer.model).items() if not torch.equal(value, weights[name])}
    assert moved == of_critic(trainer.model).keys()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained == moved | {name for name in weights if ".default." in name}


@pytest.mark.train
def test_the_policy_learns_the_same_from_values_that_it_has_no_share_in(tmp_path):
    """At λ = 1 without whitening, and a critic that says 0, PPO's advantages don't depend on its kind."""
    settings = {"lam": 1.0, "whiten_advantages": False, "optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    settings |= {"max_grad_norm": 0.0}  # of all gradients together
    moved = []
    for critic in ("head", "adapter"):
        torch.manual_seed(5)
        model = get_peft_model(tiny.stopping(), lora())
        trainer = tiny.trainer(
            PPOTrainer,
            tmp_path / critic,
            tiny.hashed,
            {"model": model},
            critic=critic,
            num_generations=1,
            per_device_train_batch_size=4,
            num_iterations=1,
            **settings,
        )
        before = tiny.weights(trainer.model)
        trainer.train()
        after = tiny.weights(trainer.model)
        moved.append({name: after[name] - before[name] for name in before if ".default." in name})
    assert any(change.any() for change in moved[0].values())
    for name, change in moved[0].items():
        torch.testing.assert_close(moved[1][name], change, rtol=1e-5, atol=1e-8)


@pytest.mark.train
def test_on_a_quantized_base_the_head_is_in_float32_and_the_adapter_as_the_policys(tmp_path):
    arguments = {"model": four_bit(tmp_path / "base"), "peft_config": lora()}
    trainer = built(tmp_path / "run", arguments, max_steps=2, learning_rate=1e-2)
    types = {name: weight.dtype for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {dtype for name, dtype in types.items() if "lora" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in types.items() if "head" in name} == {torch.float32}
    before = tiny.weights(trainer.model)
    trainer.train()
    moved = {name for name, value in tiny.weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved == types.keys()


# Files


@pytest.mark.parametrize("how", ["PeftModel", "transformers"])
def test_it_is_loaded_beside_the_policy(how, tmp_path):
    """Its folder holds the head and a plain PEFT adapter. The policy's folder knows nothing of it."""
    tiny.stopping().save_pretrained(tmp_path / "base")
    trainer = built(tmp_path / "run", {"model": str(tmp_path / "base"), "peft_config": lora()}, critic_lora_r=2)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    with torch.no_grad():
        expected = logps_and_values(trainer.model.eval(), IDS, MASK)
    assert {path.name for path in (folder / "critic").iterdir()} == {
        "critic_config.json",
        "critic.safetensors",
        "adapter",
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = (
        PeftModel.from_pretrained(base, folder) if how == "PeftModel" else AutoModelForCausalLM.from_pretrained(folder)
    )
    assert list(policy.peft_config) == ["default"] and not of_critic(policy)
    critic = load_critic(folder / "critic", policy)
    with torch.no_grad():
        found = logps_and_values(policy.eval(), IDS, MASK)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert critic.description() == json.loads((folder / "critic" / "critic_config.json").read_text())
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder / "critic/adapter"
    )
    with torch.no_grad(), using_adapter(trainer.model, "critic"):
        assert torch.equal(plain(IDS).logits, trainer.model(IDS).logits)


def test_without_it_the_policy_has_no_weights_of_it(tmp_path):
    trainer = built(tmp_path)
    names = [name for name, _ in trainer.model.named_parameters()]
    with without_critic(trainer.model):
        assert "critic" not in trainer.model.peft_config and not of_critic(trainer.model)
        trainer.model.set_adapter("default")  # PEFT freezes the others
    assert "critic" in trainer.model.peft_config and critic_of(trainer.model) is trainer.critic
    assert all(weight.requires_grad for weight in trainer.critic.trained_parameters())
    assert [name for name, _ in trainer.model.named_parameters()] == names  # as optimizers number them
    state = trainer.model.state_dict()
    actor, critic = trainer.critic.split_state_dict(state)
    assert actor.keys() | of_critic(trainer.model).keys() == state.keys()
    assert not any("critic" in name.split(".") for name in actor)
    assert {name for name in critic if "lora" not in name} == {"head.out.weight", "head.out.bias"}
    trainer.critic.save(tmp_path / "split", critic)
    trainer.critic.save(tmp_path / "whole")
    for name in ("critic.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            lambda: tiny.qwen2(hidden_size=32),
            r"'critic' was trained on '.*base' with hidden states of size 16.*has 32",
        ),
        (lambda: tiny.qwen2(vocab_size=30), r"with a vocabulary of 24, and the base of this policy, .* has 30"),
    ],
    ids=["hidden size", "vocabulary"],
)
def test_a_different_base_is_refused(other, told, tmp_path):
    tiny.stopping().save_pretrained(tmp_path / "base")
    trainer = built(tmp_path / "run", {"model": str(tmp_path / "base"), "peft_config": lora()})
    trainer.critic.save(tmp_path / "critic")
    with pytest.raises(ValueError, match=told):
        load_critic(tmp_path / "critic", get_peft_model(other(), lora()))
    with pytest.raises(ValueError, match=r"this policy has none\. Load the policy with its adapter"):
        load_critic(tmp_path / "critic", tiny.stopping())


# What is refused


def taken() -> Any:
    model = get_peft_model(tiny.stopping(), lora())
    model.add_adapter("critic", lora())
    return model


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no adapter": ({"peft_config": None}, {}, r"trains all weights\. Pass a peft_config \(LoraConfig\)"),
    "no adapter, by name": ({"peft_config": None, "model": "does/not-exist"}, {}, "critic='adapter' is an adapter on"),
    "not LoRA": (
        {"peft_config": IA3Config(target_modules=["q_proj"], feedforward_modules=[])},
        {},
        "on no base that has an adapter of the type IA3. Use a LoraConfig",
    ),
    "name taken": ({"peft_config": None, "model": taken}, {}, "has an adapter named 'critic' already, on 'Qwen2"),
    "biases are trained": (
        {"peft_config": lora(bias="all")},
        {"kl_coef": 0.0},
        r"'critic' on 'Qwen2.* relies on the policy's base, and 6 weights of it are trained, such as .*bias",
    ),
    "rank": ({}, {"critic_lora_r": 0}, "critic_lora_r=0 must be at least 1"),
    "alpha": ({}, {"critic_lora_alpha": -1.0}, r"critic_lora_alpha=-1\.0 must be positive"),
    "head": ({}, {"critic_head": "deep"}, "critic_head='deep' is unknown"),
    "rank of a head": ({}, {"critic": "head", "critic_lora_r": 8}, "critic_lora_r=8 has no effect with critic='head'"),
    "gradient into a trunk": ({}, {"critic_trunk_grad": 0.5}, r"critic_trunk_grad=0\.5 has no effect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_have_it_is_refused(name, tmp_path):
    arguments, settings, told = REFUSED[name]
    given = {"peft_config": lora(), "processing_class": tiny.tokenizer(), **arguments}
    if callable(given.get("model")):
        given["model"] = given["model"]()
    with pytest.raises(ValueError, match=told):
        built(tmp_path, given, **settings)


def test_its_learning_rate():
    assert PPOConfig("out", use_cpu=True, bf16=False, critic="adapter", learning_rate=1e-6).critic_learning_rate == (
        pytest.approx(1e-5)
    )
