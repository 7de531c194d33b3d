"""
Wrong arguments of the trainers with rollouts. Each is refused before a model is loaded: the model's name belongs to no
model. What looks alike and is right is in `test_what_is_right.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import trl.rewards
from datasets import Dataset, DatasetDict, IterableDataset
from peft import get_peft_model
from refused import check

import trl_ext
from trl_ext import DAPOTrainer, GRPOTrainer, PPOTrainer


NO_MODEL = "no-one/no-model"
SIXTEEN = range(16)


def build(trainer_class: Any = GRPOTrainer, rewards: Any = tiny.hashed, settings: Any = None, **given: Any) -> Any:
    """Constructs a trainer. Its model doesn't exist, unless one is given."""
    return tiny.trainer(trainer_class, "out", rewards, {"model": NO_MODEL, **given}, **(settings or {}))


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": ["w1 w2"] * 16, **columns})


def messages(text: str = "w1", role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


def without(attribute: str) -> Any:
    tokenizer = tiny.tokenizer()
    setattr(tokenizer, attribute, None)
    return tokenizer


def dice(sides: int) -> int:
    """
    Throws a die.

    Args:
        sides: Number of sides.
    """
    return sides


def undescribed(sides):
    return sides


def needs_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def takes_little(completions: list[Any]) -> list[float]:
    return [0.0] * len(completions)


class Judge:
    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)


EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
STREAM = {"max_steps": -1}

# What is wrong: how it is passed, and what the message has to say about it
DATA: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "none": (lambda: build(train_dataset=None), ["train_dataset=None"]),
    "a path": (lambda: build(train_dataset="rows.jsonl"), ["train_dataset is 'rows.jsonl'", "load_dataset"]),
    "a list": (lambda: build(train_dataset=[{"prompt": "w1"}]), ["train_dataset is [{'prompt'", "from_list"]),
    "splits": (lambda: build(train_dataset=DatasetDict(train=rows())), ["train_dataset", "DatasetDict", "'train'"]),
    "no rows": (lambda: build(train_dataset=rows().select([])), ["train_dataset has 0 prompts"]),
    "few rows": (lambda: build(train_dataset=rows().select(range(3))), ["train_dataset has 3", "the 4 of one"]),
    "no column": (lambda: build(train_dataset=rows().rename_column("prompt", "question")), ["['question']"]),
    "no column in a stream": (
        lambda: build(train_dataset=IterableDataset.from_generator(lambda: iter([{"question": "w1"}]))),
        ["`prompt`", "['question']"],
    ),
    "token ids": (lambda: build(train_dataset=rows(prompt=[[4, 5]] * 16)), ["`prompt` of row 0", "[4, 5]"]),
    "a dict": (lambda: build(train_dataset=rows(prompt=[messages()[0]] * 16)), ["`prompt` of row 0", "(a dict)"]),
    "numbers": (lambda: build(train_dataset=rows(prompt=list(SIXTEEN))), ["`prompt` of row 0 is 0"]),
    "lists of text": (lambda: build(train_dataset=rows(prompt=[["w1", "w2"]] * 16)), ["`prompt`", "list of str"]),
    "ShareGPT": (
        lambda: build(train_dataset=rows(prompt=[[{"from": "human", "value": "w1"}]] * 16)),
        ["`prompt` of row 0", "['from', 'value']", "maybe_convert_to_chatml", "'human' to 'user'"],
    ),
    "no content": (
        lambda: build(train_dataset=rows(prompt=[[{"role": "user"}]] * 16)),
        ["`prompt`", "without 'content'"],
    ),
    "content None": (lambda: build(train_dataset=rows(prompt=[messages(None)] * 16)), ["`prompt`", "content is None"]),
    "parts without type": (
        lambda: build(train_dataset=rows(prompt=[[{"role": "user", "content": [{"text": "w1"}]}]] * 16)),
        ["`prompt`", "[{'text': 'w1'}]"],
    ),
    "no messages": (
        lambda: build(train_dataset=rows(prompt=[[], *[messages()] * 15])),
        ["`prompt` of row 0", "empty"],
    ),
    "None in all rows": (lambda: build(train_dataset=rows(prompt=[None] * 16)), ["`prompt` of row 0 is None"]),
    "None in one row": (lambda: build(train_dataset=late_none()), ["`prompt` of row 19999 is None"]),
    "nothing to continue": (lambda: build(train_dataset=rows(prompt=[""] * 16)), ["`prompt` is ''", "bos_token"]),
    "column completions": (lambda: build(train_dataset=rows(completions=SIXTEEN)), ["'completions'", "rename_column"]),
    "column prompts": (lambda: build(train_dataset=rows(prompts=SIXTEEN)), ["'prompts'", "rename_column"]),
    "column trainer_state": (lambda: build(train_dataset=rows(trainer_state=SIXTEEN)), ["'trainer_state'"]),
    "column log_extra": (lambda: build(train_dataset=rows(log_extra=SIXTEEN)), ["'log_extra'"]),
    "column log_metric": (lambda: build(train_dataset=rows(log_metric=SIXTEEN)), ["'log_metric'"]),
    "pandas rows": (lambda: build(train_dataset=rows().with_format("pandas")), ["'pandas'", "with_format(None)"]),
    "a stream without max_steps": (
        lambda: build(train_dataset=rows().to_iterable_dataset(), settings=STREAM),
        ["max_steps=-1"],
    ),
    "no template": (
        lambda: build(train_dataset=tiny.prompts(conversational=True), processing_class=without("chat_template")),
        ["processing_class", "no chat template"],
    ),
    "evaluation without prompts": (
        lambda: build(eval_dataset=Dataset.from_dict({"question": ["w1"]})),
        ["eval_dataset", "['question']"],
    ),
    "evaluation of several, one without prompts": (
        lambda: build(eval_dataset={"easy": rows(), "hard": Dataset.from_dict({"question": ["w1"]})}),
        ["eval_dataset['hard']", "['question']"],
    ),
    "evaluation without rows": (lambda: build(eval_dataset=rows().select([])), ["eval_dataset has 0 rows"]),
    "evaluation without data": (lambda: build(settings=EVALUATES), ["eval_strategy='steps'", "eval_dataset"]),
    "evaluation without a column": (
        lambda: build(rewards=needs_answer, train_dataset=rows(answer=SIXTEEN), eval_dataset=rows()),
        ["`needs_answer`", "'answer'", "eval_dataset"],
    ),
    "PPO: token ids": (
        lambda: build(PPOTrainer, train_dataset=rows(prompt=[[4, 5]] * 16)),
        ["`prompt` of row 0", "[4, 5]"],
    ),
    "PPO: no column, with a reward model": (
        lambda: build(
            PPOTrainer,
            [],
            train_dataset=Dataset.from_dict({"question": ["w1"] * 16}),
            reward_model=NO_MODEL,
            processing_class=None,
        ),
        ["`prompt`", "['question']"],
    ),
}

REWARDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "none": (lambda: build(rewards=None), ["reward_funcs is empty"]),
    "an empty list": (lambda: build(rewards=[]), ["reward_funcs is empty"]),
    "a number": (lambda: build(rewards=3), ["reward_funcs has 3"]),
    "a dict": (lambda: build(rewards={"even": tiny.hashed}), ["reward_funcs has {'even'"]),
    "None among them": (lambda: build(rewards=[tiny.hashed, None]), ["reward_funcs has None"]),
    "a class": (lambda: build(rewards=Judge), ["reward_funcs has the class Judge", "Judge(...)"]),
    "the name of a function": (lambda: build(rewards="accuracy_reward"), ["'accuracy_reward'", "from trl.rewards"]),
    # The package math_verify is not among what the tests install
    "a function of TRL's that needs a package": (
        lambda: build(rewards=trl.rewards.accuracy_reward, train_dataset=rows(solution=SIXTEEN)),
        ["`accuracy_reward`", "math_verify", "Install"],
    ),
    "a column that isn't there": (lambda: build(rewards=needs_answer), ["`needs_answer`", "'answer'", "'target'"]),
    "a column that is dropped": (
        lambda: build(
            rewards=needs_answer,
            train_dataset=rows(answer=SIXTEEN),
            settings={"remove_unused_columns": True},
        ),
        ["'answer'", "remove_unused_columns=True"],
    ),
    "no **kwargs": (lambda: build(rewards=takes_little), ["`takes_little`", "'prompts'", "**kwargs"]),
    "too many weights": (
        lambda: build(settings={"reward_weights": [1.0, 2.0]}),
        ["reward_weights=[1.0, 2.0]", "1 rew"],
    ),
    "one weight": (lambda: build(settings={"reward_weights": 1.0}), ["reward_weights=1.0", "[1.0]"]),
    "too many tokenizers": (
        lambda: build(reward_processing_classes=[None, None]),
        ["reward_processing_classes has 2", "1 reward"],
    ),
    "a tokenizer by name": (lambda: build(reward_processing_classes=["m"]), ["reward_processing_classes is 'm'"]),
    "an unknown outcome": (lambda: build(settings={"outcome_reward_funcs": ["right"]}), ["'right'", "hashed"]),
    "outcomes by one name": (lambda: build(settings={"outcome_reward_funcs": "hashed"}), ["['hashed']"]),
    "a language model": (lambda: build(rewards=tiny.qwen2()), ["reward model", "Qwen2ForCausalLM"]),
    "two outputs": (lambda: build(rewards=tiny.classifier(num_labels=2)), ["2 outputs", "num_labels=1"]),
    "PPO: none": (lambda: build(PPOTrainer, None), ["reward_funcs is empty"]),
    "PPO: reward_model": (lambda: build(PPOTrainer, [], reward_model=3), ["reward_model is 3"]),
}

OTHERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no model": (lambda: build(model=None), ["model is None"]),
    "a data set for a model": (lambda: build(model=rows()), ["model is a Dataset"]),
    "a class for a model": (lambda: build(model=torch.nn.Linear), ["model is the class Linear"]),
    "a classifier": (lambda: build(model=tiny.classifier()), ["Qwen2ForSequenceClassification", "can't write text"]),
    "no argument model": (lambda: GRPOTrainer(reward_funcs=tiny.hashed), ["'model'", "reward_funcs"]),
    "a misspelt argument": (lambda: build(train_datset=rows()), ["'train_datset'", "'train_dataset'"]),
    "an argument of another trainer": (lambda: build(reward_model="m"), ["'reward_model'", "reward_funcs"]),
    "args: a dict": (
        lambda: GRPOTrainer(NO_MODEL, tiny.hashed, args={}),
        ["`args`", "dict", "Pass GRPOConfig(**args)"],
    ),
    "args: DPO's": (
        lambda: GRPOTrainer(NO_MODEL, tiny.hashed, args=trl_ext.DPOConfig(**tiny.pair_settings("out"))),
        ["`args`", "not DPOConfig"],
    ),
    "args: another method's": (
        lambda: DAPOTrainer(NO_MODEL, tiny.hashed, args=trl_ext.GSPOConfig(**tiny.cpu_settings("out"))),
        ["`args`", "GSPOConfig", "DAPOConfig"],
    ),
    "processing_class: a name": (lambda: build(processing_class="m"), ["processing_class is 'm'", "AutoTokenizer"]),
    "processing_class: none for a model without a name": (
        lambda: build(model=tiny.qwen2(), processing_class=None),
        ["processing_class=None", "Qwen2ForCausalLM"],
    ),
    "processing_class: no end": (
        lambda: build(processing_class=without("eos_token")),
        ["processing_class", "eos_token"],
    ),
    "peft_config: a dict": (lambda: build(peft_config={"r": 4}), ["peft_config is {'r': 4}", "LoraConfig"]),
    "peft_config: a second adapter": (
        lambda: build(model=get_peft_model(tiny.qwen2(), tiny.lora()), peft_config=tiny.lora()),
        ["peft_config", "already has an adapter"],
    ),
    "callbacks: one": (lambda: build(callbacks=trl_ext.HealthChecks()), ["callbacks is a HealthChecks", "list"]),
    "callbacks: a function": (lambda: build(callbacks=[print]), ["callbacks has", "TrainerCallback"]),
    "optimizers: a class": (lambda: build(optimizers=torch.optim.AdamW), ["optimizers is the class AdamW"]),
    "optimizers: three": (lambda: build(optimizers=(None, None, None)), ["optimizers has 3", "(optimizer, None)"]),
    "tools: one": (lambda: build(tools=dice), ["tools is a function", "list"]),
    "tools: a name": (lambda: build(tools=["dice"]), ["tools has 'dice'"]),
    "tools: no docstring": (lambda: build(tools=[undescribed]), ["`undescribed`", "docstring"]),
    "tools: prompts are text": (lambda: build(tools=[dice]), ["tools", "'w0 w0'", "'role': 'user'"]),
    "curriculum: a name": (lambda: build(curriculum="frontier"), ["curriculum='frontier'", "DifficultyCurriculum"]),
    "curriculum: a stream": (
        lambda: build(curriculum=trl_ext.DifficultyCurriculum(), train_dataset=rows().to_iterable_dataset()),
        ["curriculum", "train_dataset"],
    ),
    "PPO: ref_model": (lambda: build(PPOTrainer, ref_model=3), ["ref_model is 3"]),
    "PPO: value_model": (lambda: build(PPOTrainer, value_model=["m"]), ["value_model is ['m']"]),
    "PPO: value_model with two outputs": (
        lambda: build(PPOTrainer, value_model=tiny.classifier(num_labels=2)),
        ["value_model has 2 outputs"],
    ),
    "PPO: ptx_dataset": (lambda: build(PPOTrainer, ptx_dataset=rows()), ["ptx_coef=0", "ptx_dataset"]),
    "PPO: ptx_dataset is a list": (
        lambda: build(PPOTrainer, ptx_dataset=[{"text": "w1"}], settings={"ptx_coef": 1.0}),
        ["ptx_dataset is ["],
    ),
}

SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a number as text": ({"learning_rate": "1e-4"}, ["learning_rate='1e-4'", "number"]),
    "a whole number as text": ({"num_generations": "4"}, ["num_generations='4'", "number"]),
    "a truth value as text": ({"bf16": "false"}, ["bf16='false'", "True or False"]),
    "one generation": ({"num_generations": 1}, ["num_generations=1", "2 or more"]),
    "generations that don't divide": ({"num_generations": 3}, ["num_generations (3)", "generation_batch_size (16)"]),
    "no completion": ({"max_completion_length": 0}, ["max_completion_length=0"]),
    "no temperature": ({"temperature": 0.0}, ["temperature=0.0"]),
    "an unknown loss": ({"loss_type": "dapoo"}, ["loss_type='dapoo'", "'dapo'"]),
    "an unknown selection": ({"rollout_selection": "some"}, ["rollout_selection='some'", "'refill'"]),
    "an unknown estimator": ({"advantage_estimator": "gea"}, ["advantage_estimator='gea'", "'group'"]),
    "columns as one name": ({"similar_prompts_columns": "topic"}, ["similar_prompts_columns='topic'", "['topic']"]),
}


def late_none() -> Dataset:
    """None where no look at the first rows would find it."""
    return Dataset.from_dict({"prompt": ["w1"] * 19_999 + [None]})


@pytest.mark.parametrize("case", DATA)
def test_data(case):
    check(*DATA[case])


@pytest.mark.parametrize("case", REWARDS)
def test_rewards(case):
    check(*REWARDS[case])


@pytest.mark.parametrize("case", OTHERS)
def test_other_arguments(case):
    check(*OTHERS[case])


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case):
    settings, parts = SETTINGS[case]
    check(lambda: trl_ext.GRPOConfig(**tiny.cpu_settings("out", **settings)), parts)
