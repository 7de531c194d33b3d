"""Scorers that are trained on pairs: what they learn, from what they start, and what they leave behind."""

import copy
import random
from typing import Any

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer

from trl_ext.preferences.cleaning import clean_by_cross_fitting, pair_margins
from trl_ext.preferences.scorers import ImplicitRewardTraining, RewardModelTraining


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny.qwen2().save_pretrained(folder)
    return str(folder)


@pytest.mark.train
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("fit_class", [RewardModelTraining, ImplicitRewardTraining])
def test_scorers_learn_what_pairs_say(fit_class, conversational, policy):
    """The completion that ends in w19 is better, wherever."""
    rng = random.Random(0)

    def row(good: bool) -> str:
        return " ".join([*(f"w{rng.randrange(10)}" for _ in range(rng.randrange(3))), "w19" if good else "w18"])

    rows = [{"prompt": f"w{i % 10} ", "chosen": row(True), "rejected": row(False)} for i in range(64)]
    if conversational:
        rows = [
            {
                name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
                for name, text in r.items()
            }
            for r in rows
        ]
    pairs = Dataset.from_list(rows).add_column("margin", [100.0] * 64)  # not for the trainer's loss
    arguments = tiny.cpu_settings(".", per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=16)
    for name in ("num_generations", "max_completion_length", "output_dir"):
        arguments.pop(name)
    scorer = fit_class(policy, arguments, processing_class=tiny.tokenizer())(pairs.select(range(48)))
    margins = pair_margins(pairs.select(range(48, 64)), scorer)
    assert sum(margin > 0 for margin in margins) >= 15
    again = fit_class(policy, arguments, processing_class=tiny.tokenizer())(pairs.select(range(48)))
    assert pair_margins(pairs, again) == pair_margins(pairs, scorer)


def words(count: int = 8, **columns: Any) -> Dataset:
    rows = {"prompt": [f"w{i} " for i in range(count)], "chosen": ["w4"] * count, "rejected": ["w5"] * count}
    return Dataset.from_dict({**rows, **columns})


def quick(**more: Any) -> dict[str, Any]:
    """One step."""
    return {"max_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, **more}


@pytest.mark.parametrize("fit_class", [RewardModelTraining, ImplicitRewardTraining])
def test_a_loaded_model_serves_once(fit_class):
    fit = fit_class(tiny.qwen2(), quick(), LoraConfig(r=2, target_modules="all-linear"), tiny.tokenizer())
    fit.start()
    with pytest.raises(ValueError, match="The model is loaded, and a scorer was trained on it"):
        fit.start()


def test_cross_fitting_would_train_a_loaded_model_twice():
    fit = ImplicitRewardTraining(tiny.qwen2(), quick(), LoraConfig(r=2, target_modules="all-linear"), tiny.tokenizer())
    with pytest.raises(ValueError, match="The model is loaded, and a scorer was trained on it"):
        clean_by_cross_fitting(words(50), fit, folds=2)


def test_a_named_model_serves_again(policy):
    fit = ImplicitRewardTraining(policy, quick(), processing_class=tiny.tokenizer())
    assert [fit.start(), fit.start()] == [policy, policy]


@pytest.mark.parametrize("fit_class", [RewardModelTraining, ImplicitRewardTraining])
def test_nothing_is_saved_or_reported_whatever_the_arguments_say(fit_class, policy, tmp_path, monkeypatch):
    saved: list[str] = []
    monkeypatch.setattr(Trainer, "save_model", lambda trainer, folder, **kwargs: saved.append(folder))
    monkeypatch.chdir(tmp_path)
    arguments = quick(output_dir=str(tmp_path / "out"), save_strategy="steps", save_steps=1, report_to="tensorboard")
    before = dict(arguments)
    fit_class(policy, arguments, processing_class=tiny.tokenizer())(words())
    assert saved == [] and list(tmp_path.iterdir()) == []
    assert arguments == before


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_reference_is_what_the_policy_started_from(precomputed, policy):
    """With a learning rate of 0 the implicit reward is exactly 0, whether TRL kept its reference or not."""
    arguments = quick(learning_rate=0.0, precompute_ref_log_probs=precomputed)
    scorer = ImplicitRewardTraining(policy, arguments, processing_class=tiny.tokenizer())(words())
    assert scorer(prompts=["w1 ", "w2 "], completions=["w4", "w7 w8"]) == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.train
def test_one_chat_template_serves_all_rows(policy):
    fit = ImplicitRewardTraining(policy, quick(), processing_class=tiny.tokenizer())
    differing = [{"think": i < 4} for i in range(8)]
    with pytest.raises(ValueError, match="The rows have different `chat_template_kwargs`"):
        fit(words(chat_template_kwargs=differing))
    alike = fit(words(chat_template_kwargs=[{"think": True}] * 8))
    assert alike.chat_template_kwargs == {"think": True}
    assert fit(words()).chat_template_kwargs == {}


def test_an_adapters_configuration_stays_as_it_was(policy):
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    before = copy.deepcopy(lora.to_dict())
    arguments = {**tiny.pair_settings(".", max_steps=1), "bf16": False}
    arguments.pop("output_dir")
    words = {"prompt": [f"w{i} " for i in range(8)], "chosen": ["w4"] * 8, "rejected": ["w5"] * 8}
    training = ImplicitRewardTraining(policy, arguments, lora, tiny.tokenizer())
    scorer = training(Dataset.from_dict(words))
    assert scorer.reward.policy.peft_config["default"].target_modules != "all-linear"
    assert lora.to_dict() == before and training.peft_config is lora
