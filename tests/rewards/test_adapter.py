"""Rewards from an adapter on the policy's base against the same reward model loaded on its own."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import apply_chat_template

from trl_ext import AdapterReward, GRPOTrainer, PPOTrainer
from trl_ext.metric_keys import reward_mean
from trl_ext.rollouts.last_states import sharing_for
from trl_ext.rollouts.prompts import TokenizedPrompt


PROMPTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 3 + ["w5"] * 2 + ["w3 w1"]
COMPLETIONS = [" w1", " w2 w2 w2", " w7 w8", " w1 w2 w3 w4 w5 w6", " w9", " w11"]
IDS: list[list[int]] = [[]] * 6
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERS = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(tiny.reward_adapter(tmp_path_factory.mktemp("adapter_reward")))


def policy(folder: Path, **overrides: Any) -> Any:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder.parent / "base"), tiny.lora(**overrides))


def alone(folder: Path, texts: list[str], tokenizer: Any = None) -> list[float]:
    """What TRL does with a reward model, and what PEFT loads."""
    tokenizer = tokenizer or tiny.tokenizer()
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        return model(**inputs).logits[:, 0].tolist()


def attached(folder: Path, model: Any = None, share_prefixes: Any = True, **settings: Any) -> AdapterReward:
    model = model or policy(folder)
    sharing = sharing_for(model, "sdpa", share_prefixes == "always") if share_prefixes else None
    return AdapterReward(folder).attached(model, tokenizer=tiny.tokenizer(), sharing=sharing, **settings)


def ask(reward: Any, prompts: Any = PROMPTS, completions: Any = COMPLETIONS, **kwargs: Any) -> list[float]:
    return reward(prompts=prompts, completions=completions, completion_ids=IDS, target=[1] * 6, **kwargs)


def close(found: list[float], wanted: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


# Values


@pytest.mark.parametrize("share_prefixes", [False, "always"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_those_of_the_reward_model_on_its_own(folder, batch_size, share_prefixes):
    wanted = alone(folder, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    close(ask(attached(folder, batch_size=batch_size, share_prefixes=share_prefixes)), wanted)
    assert len({round(score, 3) for score in wanted}) == 6


def test_conversations(folder):
    rows = [{"messages": p + c} for p, c in zip(CHATS, ANSWERS, strict=True)]
    texts = [apply_chat_template(row, tiny.tokenizer())["text"] for row in rows]
    close(ask(attached(folder), CHATS, ANSWERS), alone(folder, texts))


def test_padding_that_is_the_end_of_sequence_is_passed_over(folder, tmp_path):
    # As transformers' classifier does it: such a row is read before its end
    own = shutil.copytree(folder, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(own)
    texts = [f"{p}{c} <eos>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    found = ask(attached(own, policy(folder)), completions=[f"{text} <eos>" for text in COMPLETIONS])
    close(found, alone(folder, texts, tokenizer))
    close(found, ask(attached(own, policy(folder))))


def test_prompts_that_are_token_ids(folder):
    ids = [[7, 2], [7, 9, 8], [5], [2], [11, 12], [6]]
    prompts = [TokenizedPrompt("w19", [4 + i, 9]) for i in range(6)]
    reward = attached(folder)
    found = reward(prompts=prompts, completions=COMPLETIONS, completion_ids=ids)
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        rows = [torch.tensor([[4 + i, 9, *completion]]) for i, completion in enumerate(ids)]
        close(found, [model(row).logits.item() for row in rows])


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}], ids=str)
def test_what_the_policy_has_learned_elsewhere_doesnt_count(settings, folder):
    model = policy(folder, **settings)
    reward = attached(folder, model)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight += 1.0
    close(ask(reward), alone(folder, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]))


def test_it_leaves_the_policy_alone(folder):
    model = policy(folder, lora_dropout=0.5)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    reward = attached(folder, model)
    model.train()
    before = tiny.weights(model)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    random = torch.get_rng_state()
    first = ask(reward)
    assert ask(reward) == first  # no dropout
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trained
    assert list(model.active_adapters) == ["default"]
    after = tiny.weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


# What is computed


def test_shared_prompts_are_computed_once(folder):
    logged: dict[str, float] = {}
    shared = ask(attached(folder, batch_size=6, share_prefixes="always"), log_metric=logged.__setitem__)
    apart: dict[str, float] = {}
    close(shared, ask(attached(folder, batch_size=6, share_prefixes=False), log_metric=apart.__setitem__))
    # Rows of 10, 12, 11, 7, 2 and 3 tokens
    assert logged["compute/reward_tokens_unshared"] == apart["compute/reward_tokens_unshared"] == 6 * 12
    assert apart["compute/reward_tokens"] == 6 * 12
    assert logged["compute/reward_tokens"] < 45
    assert logged["compute/reward_passes"] == apart["compute/reward_passes"] == 1


def test_rows_of_a_prompt_stay_together_and_batches_have_similar_lengths(folder):
    logged: dict[str, float] = {}
    ask(attached(folder, batch_size=3, share_prefixes=False), log_metric=logged.__setitem__)
    # The three short rows, then the three of the long prompt
    assert logged["compute/reward_tokens"] == 3 * 7 + 3 * 12


# In trainers


def trainer(folder: Path, output: Path, kind: Any = GRPOTrainer, reward: Any = None, **settings: Any) -> Any:
    arguments = {"model": str(folder.parent / "base"), "peft_config": tiny.lora(task_type="CAUSAL_LM")}
    arguments |= settings.pop("arguments", {})
    return tiny.trainer(kind, output, AdapterReward(folder) if reward is None else reward, arguments, **settings)


def metrics(made: Any, key: str) -> list[float]:
    return [log[key] for log in made.state.log_history if key in log]


@pytest.mark.train
def test_a_trainer_gets_the_rewards_that_trl_gets_from_the_same_reward_model(folder, tmp_path):
    tokenizers = {"reward_processing_classes": [None, tiny.tokenizer()]}
    made = trainer(folder, tmp_path, reward=[AdapterReward(folder), str(folder)], arguments=tokenizers)
    made.train()
    for statistic in ("mean", "std"):
        close(metrics(made, f"rewards/reward/{statistic}"), metrics(made, f"rewards/base/{statistic}"))
    assert len(metrics(made, reward_mean("reward"))) == 2
    assert metrics(made, "compute/reward_tokens")[0] <= metrics(made, "compute/reward_tokens_unshared")[0]
    assert metrics(made, "compute/reward_passes") == [2.0, 2.0]


@pytest.mark.train
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(GRPOTrainer, {"gradient_checkpointing": True, "beta": 0.1}), (PPOTrainer, {"kl_coef": 0.1})],
    ids=["grpo", "ppo"],
)
def test_the_reward_is_the_same_before_and_after_training(kind, settings, folder, tmp_path):
    made = trainer(folder, tmp_path, kind, save_strategy="steps", save_steps=1, **settings)
    (reward,) = [guard.func for guard in made.reward_guards]
    before, weights = ask(reward), tiny.weights(made.model)
    made.train()
    after = tiny.weights(made.model)
    moved = {name for name in weights if not torch.equal(after[name], weights[name])}
    assert moved and all("default" in name or "critic" in name for name in moved)
    assert ask(reward) == before
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "reward").exists()
    resumed = trainer(folder, tmp_path, kind, save_strategy="no", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    finished = tiny.weights(resumed.model)
    assert all(torch.equal(finished[name], after[name]) for name in after)


def test_two_reward_adapters(folder, tmp_path):
    rewards = [AdapterReward(folder), AdapterReward(folder, adapter="second", name="other")]
    made = trainer(folder, tmp_path, reward=rewards, max_steps=1)
    made.train()
    assert metrics(made, "rewards/other/mean") == metrics(made, "rewards/reward/mean")
    assert list(made.model.peft_config) == ["default", "reward", "second"]


def test_ppo_of_token_ids(folder, tmp_path):
    rows = tiny.prompts().map(lambda row: {"input_ids": tiny.tokenizer()(row["prompt"])["input_ids"]})
    made = trainer(
        folder, tmp_path, PPOTrainer, max_steps=1, arguments={"train_dataset": rows.remove_columns(["prompt"])}
    )
    made.train()
    assert len(metrics(made, "rewards/reward/mean")) == 1


# What is refused


def refused(folder: Path, tmp_path: Path, message: str, **changed: Any) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(folder, tmp_path, **changed)


def test_what_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
    refused(
        folder,
        tmp_path,
        r"in .*/reward relies on the base '.*/base' as it is.*Pass a peft_config",
        arguments={"peft_config": None},
    )
    refused(
        folder,
        tmp_path,
        r"/reward and .*/reward, would both be 'reward' in the policy.*adapter='another name'",
        reward=[AdapterReward(folder), AdapterReward(folder)],
    )
    for settings in ({"rewards_in_flight": 2}, {"reward_timeout": 1.0}):
        refused(folder, tmp_path, r"call reward functions from other threads.*Leave both at None", **settings)
    shutil.copytree(folder.parent / "base", tmp_path / "elsewhere")
    refused(
        folder,
        tmp_path,
        r"was trained on another base than the policy's, '.*/elsewhere'",
        arguments={"model": str(tmp_path / "elsewhere")},
    )


def test_an_adapter_without_a_head_as_a_reward_model_of_its_own(folder, tmp_path):
    policy(folder).save_pretrained(tmp_path / "policy")
    refused(folder, tmp_path, r"has no score head: it is no reward model", reward=str(tmp_path / "policy"))


def test_arguments(folder):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        AdapterReward(folder, batch_size=0)
    with pytest.raises(TypeError, match=r"tokenizer is 'base'\. Pass the reward model's tokenizer"):
        AdapterReward(folder, tokenizer="base")
    for name in ("", "a.b", "my_lora"):
        with pytest.raises(ValueError, match=r"can't be the name of an adapter in PEFT\. Choose another"):
            AdapterReward(folder, adapter=name)


def test_calls_that_cant_be_answered(folder):
    with pytest.raises(RuntimeError, match=r"The reward reward has no policy.*Pass it to a trainer"):
        ask(AdapterReward(folder))
    reward, errors = attached(folder), []

    def from_a_thread() -> None:
        try:
            ask(reward)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=from_a_thread)
    thread.start()
    thread.join()
    assert "shares its model with the thread that made it" in errors[0]
    with pytest.raises(ValueError, match="has no tokens"):
        ask(reward, prompts=[""] * 6, completions=[""] * 6)
    larger = tiny.tokenizer()
    larger.add_tokens([f"x{i}" for i in range(9)])
    reward = AdapterReward(folder, tokenizer=larger).attached(policy(folder), tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match=r"makes the token id \d+, and the policy has only 24 embeddings"):
        ask(reward, completions=["x3"] * 6)
    with pytest.raises(ValueError, match=r"Prompts are token ids, and the reward adapter in .* has another tokenizer"):
        ask(reward, prompts=[TokenizedPrompt("w1", [5])] * 6)
