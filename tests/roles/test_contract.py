"""
The contract of critics. A further kind is one class and one entry: it trains, is saved and is loaded, and nothing else
has to know of it.
"""

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from trl.kernels import chunked_logprob

from trl_ext import GRPOTrainer, PPOConfig, PPOTrainer, load_critic
from trl_ext.roles import critic as critics
from trl_ext.roles.critic import (
    CRITICS,
    AdapterCritic,
    Critic,
    HeadCritic,
    ModelCritic,
    critic_class,
    logps_and_values,
)
from trl_ext.trainers.seams.critic import CPU_TILE


class ConstantPlusLinear(Critic):
    """V = c + w·h, and a parameter that isn't trained."""

    kind = "constant_plus_linear"
    learning_rate_factor = 7.0
    reads_token_ids = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(()))
        self.linear = nn.Parameter(torch.zeros(size))
        self.offset = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    @classmethod
    def for_policy(cls, policy: Any, config: Any, value_model: Any = None, reward_model: Any = None) -> Any:
        return cls(policy.config.hidden_size)

    @classmethod
    def from_description(cls, description: dict[str, Any], actor: Any) -> Any:
        return cls(description["size"])

    def description(self) -> dict[str, Any]:
        return super().description() | {"size": len(self.linear)}

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return self.offset + self.constant + hidden.detach().float() @ self.linear


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(CRITICS, ConstantPlusLinear.kind, ConstantPlusLinear)


@pytest.mark.train
def test_a_further_kind_is_one_class_and_one_entry(registered, tmp_path):
    settings = {"critic": "constant_plus_linear", "num_generations": 1, "per_device_train_batch_size": 4}
    settings |= {"learning_rate": 0.01, "num_iterations": 1, "max_steps": 2, "critic_warmup_steps": 1}
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.hashed, save_strategy="steps", save_steps=1, **settings)
    assert isinstance(trainer.critic, ConstantPlusLinear)
    before = tiny.weights(trainer.model)
    trainer.train()
    (group,) = [group for group in trainer.optimizer.param_groups if group.get("is_critic")]
    assert group["initial_lr"] == pytest.approx(0.07)
    assert {id(p) for p in group["params"]} == {id(trainer.critic.constant), id(trainer.critic.linear)}
    moved = {name for name, value in tiny.weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert {name for name in moved if "critic" in name} == {"critic.constant", "critic.linear"}
    assert any("critic" not in name for name in moved)  # the second step moved the policy
    # Saved apart from the policy, loaded with it, and resumed
    trainer.save_model()
    policy = type(trainer.model).from_pretrained(tmp_path)
    assert not any("critic" in name for name in policy.state_dict())
    loaded = load_critic(tmp_path / "critic", policy)
    assert isinstance(loaded, ConstantPlusLinear)
    ids = torch.tensor([[5, 9, 4, 17]])
    trainer.model.eval()
    expected = logps_and_values(trainer.model, ids, torch.ones_like(ids))
    found = logps_and_values(policy.eval(), ids, torch.ones_like(ids))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    resumed = tiny.trainer(PPOTrainer, tmp_path / "resumed", tiny.hashed, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(v, resumed.model.state_dict()[name]) for name, v in trainer.model.state_dict().items())


def test_settings_of_other_kinds_have_no_effect_and_are_refused(registered):
    for name, value in (("critic_head", "mlp"), ("critic_trunk_grad", 0.5), ("critic_init", "policy")):
        with pytest.raises(ValueError, match=f"{name}={value!r} has no effect with critic='constant_plus_linear'"):
            PPOConfig("out", use_cpu=True, bf16=False, critic="constant_plus_linear", **{name: value})


# What is half a critic


PARTS: dict[str, Any] = {
    "learning_rate_factor": 1.0,
    "for_policy": classmethod(lambda cls, *args, **kwargs: cls()),
    "from_description": classmethod(lambda cls, *args, **kwargs: cls()),
    "values": lambda self, hidden, inputs: hidden.sum(dim=-1),
}


@pytest.mark.parametrize("missing", PARTS)
def test_half_a_critic_is_an_error_where_it_is_defined(missing):
    parts = {name: part for name, part in PARTS.items() if name != missing}
    with pytest.raises(TypeError, match=f"Half is half a critic: it lacks {missing}"):
        type("Half", (Critic,), {"kind": "half", **parts})
    type("Whole", (Critic,), {"kind": "whole", **PARTS})


def test_a_base_of_several_kinds_may_be_half_a_critic():
    parts = {name: part for name, part in PARTS.items() if name != "values"}
    base = type("Base", (Critic,), parts)
    with pytest.raises(TypeError, match="it lacks values"):
        type("Half", (base,), {"kind": "half"})
    type("Whole", (base,), {"kind": "whole", "values": PARTS["values"]})


def test_an_unknown_kind_and_one_by_two_names(monkeypatch):
    with pytest.raises(ValueError, match=r"critic='linear' is unknown\. Choose one of 'head', 'adapter', 'model'"):
        critic_class("linear")
    monkeypatch.setitem(CRITICS, "by_another_name", ConstantPlusLinear)
    with pytest.raises(ValueError, match="is ConstantPlusLinear, whose `kind` is 'constant_plus_linear'"):
        PPOConfig("out", use_cpu=True, bf16=False, critic="by_another_name")


def test_a_saved_kind_that_is_unknown_here(registered, tmp_path, monkeypatch):
    ConstantPlusLinear(16).save(tmp_path)
    assert isinstance(load_critic(tmp_path, tiny.qwen2()), ConstantPlusLinear)
    monkeypatch.delitem(CRITICS, ConstantPlusLinear.kind)
    with pytest.raises(ValueError, match=f"{tmp_path} can't be loaded.*'constant_plus_linear' is unknown"):
        load_critic(tmp_path, tiny.qwen2())


def test_every_kind_keeps_the_contract():
    assert {cls.kind: cls for cls in (HeadCritic, AdapterCritic, ModelCritic)} == CRITICS
    settings = {name for cls in CRITICS.values() for name in cls.settings}
    assert all(hasattr(PPOConfig("out", use_cpu=True, bf16=False), name) for name in settings)
    assert critics.__doc__ and all(cls.__name__ in critics.__doc__ for cls in CRITICS.values())


# Without a critic


def test_seams_without_a_critic_do_nothing(tmp_path):
    sizes = []

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        sizes.append(chunked_logprob.TOKEN_CHUNK_SIZE)
        return tiny.hashed(completion_ids)

    # TRL loads a reference by its name; refreshing it stays TRL's business
    tiny.stopping().save_pretrained(tmp_path / "policy")
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "beta": 0.1, "sync_ref_model": True}
    trainer = tiny.trainer(GRPOTrainer, tmp_path, reward, {"model": str(tmp_path / "policy")}, **settings)
    trainer.train()
    assert trainer.critic is None and trainer.ref_model is not None
    assert not any(group.get("is_critic") for group in trainer.optimizer.param_groups)
    assert not list(tmp_path.glob("**/critic"))
    assert CPU_TILE not in sizes
