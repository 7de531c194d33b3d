"""What PPO writes: a policy that knows nothing of a critic, a critic beside it, and both the same in a new process."""

import copy
import json
from typing import Any

import processes
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2ForSequenceClassification

from trl_ext import PPOTrainer
from trl_ext.roles.critic import logps_and_values


pytestmark = pytest.mark.train


IDS = torch.tensor([[5, 9, 4, 17, 8, 2], [7, 7, 11, 20, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
TEMPERATURE = 0.7

# Only what a user would write: nothing of the training process is there
LOADS = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl_ext import load_critic
from trl_ext.roles.critic import logps_and_values

ids, mask, cases = (torch.tensor(part) if i < 2 else part for i, part in enumerate(json.loads(sys.argv[1])))
results = {}
for name, (folder, base, temperature) in cases.items():
    policy = AutoModelForCausalLM.from_pretrained(base or folder)
    policy = PeftModel.from_pretrained(policy, folder) if base else policy
    load_critic(f"{folder}/critic", policy, temperature=temperature)
    with torch.no_grad():
        results[name] = logps_and_values(policy.eval(), ids, mask)
torch.save(results, sys.argv[2])
"""


def classifier() -> Any:
    torch.manual_seed(1)
    config = copy.deepcopy(tiny.qwen2().config)
    config.num_labels = 1
    return Qwen2ForSequenceClassification(config)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({}, dict),
    "mlp": ({"critic_head": "mlp", "critic_trunk_grad": 0.5}, dict),
    "model": ({"critic": "model"}, dict),
    "value model": ({}, lambda: {"value_model": classifier()}),
    "lora": ({"critic_head": "mlp"}, lambda: {"peft_config": lora()}),
    "lora and model": ({"critic": "model"}, lambda: {"peft_config": lora()}),
    "lora and adapter": ({"critic": "adapter", "critic_lora_r": 2}, lambda: {"peft_config": lora()}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For each case where it was saved, and what its policy and critic said before."""
    root, saved = tmp_path_factory.mktemp("ppo"), {}
    tiny.stopping().save_pretrained(root / "base")
    for name, (settings, arguments) in CASES.items():
        folder = root / name
        trainer = tiny.trainer(
            PPOTrainer,
            folder,
            tiny.hashed,
            {"model": str(root / "base"), **arguments()},
            num_generations=1,
            per_device_train_batch_size=4,
            num_iterations=1,
            max_steps=2,
            temperature=TEMPERATURE,
            critic_learning_rate=0.1,
            save_strategy="steps",
            save_steps=2,
            **settings,
        )
        trainer.train()
        trainer.save_model()
        with torch.no_grad():
            before = logps_and_values(trainer.model.eval(), IDS, MASK)
        assert before[1].abs().min() > 0
        saved[name] = folder, before
    return root, saved


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    """The same from a process that started after that."""
    root, saved = trained
    cases = {
        name: (str(folder), str(root / "base") if "lora" in name else None, TEMPERATURE)
        for name, (folder, _) in saved.items()
    }
    checkpoints = {f"{name}, checkpoint": (f"{case[0]}/checkpoint-2", *case[1:]) for name, case in cases.items()}
    results = tmp_path_factory.mktemp("loaded") / "results.pt"
    printed = processes.run(["-c", LOADS, json.dumps([IDS.tolist(), MASK.tolist(), cases | checkpoints]), results])
    return torch.load(results, weights_only=True), printed


@pytest.mark.parametrize("where", ["", ", checkpoint"])
@pytest.mark.parametrize("name", CASES)
def test_a_new_process_reads_the_same_values_and_log_probabilities(name, where, trained, loaded):
    logps, values = trained[1][name][1]
    found = loaded[0][name + where]
    assert torch.equal(found[0], logps)
    assert torch.equal(found[1], values)


def test_nothing_is_missing_or_left_over_when_it_is_loaded(loaded):
    for word in ("MISSING", "UNEXPECTED", "newly initialized", "not used"):
        assert word not in loaded[1]


@pytest.mark.parametrize("where", [".", "checkpoint-2"])
@pytest.mark.parametrize("name", CASES)
def test_the_files_of_the_policy_hold_no_critic(name, where, trained):
    folder = trained[1][name][0] / where
    weights = load_file(folder / ("adapter_model.safetensors" if "lora" in name else "model.safetensors"))
    assert not list(folder.glob("critic/*.safetensors.index.json")) and not (folder / "critic.safetensors").exists()
    assert weights and not any("critic" in key or "score" in key for key in weights)
    if "lora" not in name:
        _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
    description = json.loads((folder / "critic" / "critic_config.json").read_text())
    assert description["critic"] == ("model" if "model" in name else "adapter" if "and adapter" in name else "head")
    head = load_file(folder / "critic" / "critic.safetensors")
    assert any(value.any() for key, value in head.items() if "score" in key or "out" in key)


def test_a_trained_policy_can_be_trained_again(trained):
    # Its folder is a policy like any other, the one of an adapter included
    for name in ("linear", "lora"):
        folder = trained[1][name][0]
        policy = AutoModelForCausalLM.from_pretrained(folder)
        names = {key for key, _ in policy.named_parameters()}
        assert not any("critic" in key for key in names)


def test_a_score_model_can_be_made_of_a_critic(trained):
    # The weights of a model critic are those of a sequence classifier, by another name for its backbone
    folder = trained[1]["value model"][0] / "critic"
    config = json.loads((folder / "critic_config.json").read_text())["config"]
    model = AutoModelForSequenceClassification.from_config(type(tiny.qwen2().config)(**config))
    weights = {
        key.replace("backbone.", "model."): value for key, value in load_file(folder / "critic.safetensors").items()
    }
    model.load_state_dict(weights)
