"""Who plays which role on one policy, and what can't."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn

from roles.test_adapter_critic import IDS, built, lora
from roles.test_switching import two_adapters
from trl_ext import DPOConfig, DPOTrainer, PPOTrainer
from trl_ext.roles.roles import Roles, roles_on
from trl_ext.roles.switching import using_adapter


def test_roles_of_ppo_on_one_trunk(tmp_path):
    trainer = built(tmp_path)
    roles = trainer.roles
    told = roles.describe()
    assert {name: role["adapter"] for name, role in told.items()} == {
        "actor": "default",
        "critic": "critic",
        "reference": "ref",
    }
    own = {n: sum(w.numel() for k, w in trainer.model.named_parameters() if f".{n}." in k) for n in ("default", "ref")}
    assert told["actor"]["parameters"] == told["actor"]["trained"] == own["default"] > 0
    assert (told["reference"]["parameters"], told["reference"]["trained"]) == (own["ref"], 0)
    assert told["critic"]["trained"] == sum(w.numel() for w in trainer.critic.trained_parameters())
    assert "critic: adapter 'critic' on the base Qwen2ForCausalLM" in str(roles)


@pytest.mark.parametrize("critic", ["head", "model"])
def test_roles_of_ppo_that_share_nothing(critic, tmp_path):
    settings = {"num_generations": 1, "per_device_train_batch_size": 4, "critic": critic}
    given = {"reward_processing_classes": [tiny.tokenizer()]}
    trainer = tiny.trainer(PPOTrainer, tmp_path, tiny.classifier(), given, **settings)
    told = trainer.roles.describe()
    assert [*told] == ["actor", "critic", trainer.reward_func_names[0], "reference"]
    sizes = {name: role["parameters"] for name, role in told.items()}
    assert sizes["actor"] == sizes["reference"] == sum(w.numel() for w in tiny.stopping().parameters())
    assert told["critic"]["trained"] == sum(w.numel() for w in trainer.critic.parameters())
    with trainer.roles.playing("reference") as reference:
        assert reference is trainer.accelerator.unwrap_model(trainer.ref_model)


def test_roles_of_dpo(tmp_path):
    rows = [{"prompt": f"w{i} w1", "chosen": " w2", "rejected": " w3 w4"} for i in range(8)]
    trainer = DPOTrainer(
        model=tiny.qwen2(),
        args=DPOConfig(**tiny.pair_settings(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(init_lora_weights=True),
    )
    told = trainer.roles.describe()
    assert (told["actor"]["adapter"], told["reference"]["adapter"]) == ("default", None)
    assert told["reference"]["parameters"] == 0 < told["actor"]["trained"]


def test_playing_a_role_is_computing_with_its_adapter():
    model = two_adapters()
    roles = roles_on(model, None, True, rewards={"judge": ("other", nn.Linear(16, 1))})
    for role, adapter in (("actor", "default"), ("judge", "other"), ("reference", None)):
        with torch.no_grad(), using_adapter(model, adapter):
            expected = model(IDS).logits
        with torch.no_grad(), roles.playing(role) as policy:
            assert torch.equal(policy(IDS).logits, expected)
    with (
        pytest.raises(RuntimeError, match="in a context that is still open"),
        roles.playing("judge"),
        roles.playing("reference"),
    ):
        pass
    with pytest.raises(ValueError, match="role='judges' is unknown"), roles.playing("judges"):
        pass


def test_what_is_no_role():
    roles = Roles(two_adapters())
    with pytest.raises(ValueError, match="'default' on the base model 'Qwen2ForCausalLM' would play actor and judge"):
        roles.add("judge", adapter="default")
    with pytest.raises(ValueError, match="'critic' of the role 'judge' is not on the base model 'Qwen2ForCausalLM'"):
        roles.add("judge", adapter="critic")
    with pytest.raises(ValueError, match=r"'judge' has no head, and the adapter 'other' on the base model.*Save it"):
        roles.add("judge", adapter="other", needs_head=True)
    roles.add("judge", adapter="other", head=nn.Linear(16, 1), needs_head=True)
    with pytest.raises(ValueError, match="two roles named 'judge'"):
        roles.add("judge", model=tiny.classifier())
    assert "judge" in roles and roles["judge"].on_base


def test_a_policy_without_adapters_plays_its_roles_as_it_is():
    model = tiny.qwen2()
    roles = roles_on(model, tiny.qwen2(1), True)
    with roles.playing("actor") as actor, roles.playing("reference") as reference:
        assert actor is model and reference is not model
    assert roles.describe()["actor"]["shares_base"] and not roles.describe()["reference"]["shares_base"]


def test_the_actor_is_the_adapter_that_is_active():
    model = get_peft_model(tiny.qwen2(), lora(), adapter_name="mine")
    assert Roles(model)["actor"].adapter == "mine"
