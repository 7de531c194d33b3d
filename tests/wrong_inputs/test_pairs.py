"""Wrong arguments of [`DPOTrainer`], refused before a model is loaded where the data alone show what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
from datasets import Dataset, DatasetDict, IterableDataset
from refused import check

from trl_ext import DifficultyCurriculum, DPOConfig, DPOTrainer


NO_MODEL = "no-one/no-model"
TEXT = {"prompt": ["w1 w2"] * 16, "chosen": [" w3"] * 16, "rejected": [" w4 w5"] * 16}


def build(settings: Any = None, **given: Any) -> Any:
    args = DPOConfig(**tiny.pair_settings("out", **(settings or {})))
    defaults = {"model": NO_MODEL, "processing_class": tiny.tokenizer(), "train_dataset": pairs(), "args": args}
    return DPOTrainer(**{**defaults, **given})


def pairs(**columns: Any) -> Dataset:
    """Pairs of text, with other columns, or without those that are `None`."""
    return Dataset.from_dict({name: values for name, values in {**TEXT, **columns}.items() if values is not None})


def said(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def without(attribute: str) -> Any:
    tokenizer = tiny.tokenizer()
    setattr(tokenizer, attribute, None)
    return tokenizer


def of(**columns: Any) -> Callable[[], Any]:
    return lambda: build(train_dataset=pairs(**columns))


CASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "none": (lambda: build(train_dataset=None), ["train_dataset=None", "`chosen`"]),
    "a list": (lambda: build(train_dataset=[{"chosen": "w1"}]), ["train_dataset is [{'chosen'", "from_list"]),
    "splits": (lambda: build(train_dataset=DatasetDict(train=pairs())), ["DatasetDict", "'train'"]),
    "no rows": (lambda: build(train_dataset=pairs().select([])), ["train_dataset has no rows"]),
    "an empty stream": (
        lambda: build(train_dataset=IterableDataset.from_generator(lambda: iter([]))),
        ["train_dataset has no column"],
    ),
    "no rejected": (of(rejected=None), ["no column 'rejected'", "['prompt', 'chosen']"]),
    "no pairs": (lambda: build(train_dataset=tiny.prompts()), ["no column 'chosen'", "['prompt', 'target']"]),
    "tokenized": (
        lambda: build(train_dataset=Dataset.from_dict({"prompt_ids": [[4]], "chosen_ids": [[5]]})),
        ["no column 'chosen'", "'prompt_ids'"],
    ),
    "no rejected in a stream": (
        lambda: build(train_dataset=pairs(rejected=None).to_iterable_dataset()),
        ["no column 'rejected'"],
    ),
    "None in all rows": (of(rejected=[None] * 16), ["`rejected` of row 0 is None"]),
    "None in the last row": (of(rejected=[" w3"] * 15 + [None]), ["`rejected` of row 15 is None"]),
    "None in a stream": (
        lambda: build(train_dataset=pairs(chosen=[None] * 16).to_iterable_dataset()),
        ["`chosen` of row 0 is None"],
    ),
    "a text prompt beside messages": (
        of(chosen=[said("w1")] * 16, rejected=[said("w2")] * 16),
        ["text in `prompt`", "messages in `chosen`"],
    ),
    "a message prompt beside text": (
        of(prompt=[said("w1", "user")] * 16),
        ["messages in `prompt`", "text in `chosen`"],
    ),
    "one side in messages": (
        of(prompt=None, chosen=[said("w1")] * 16),
        ["messages in `chosen`", "text in `rejected`"],
    ),
    "ShareGPT": (
        of(
            prompt=None,
            chosen=[[{"from": "gpt", "value": "w1"}]] * 16,
            rejected=[[{"from": "gpt", "value": "w"}]] * 16,
        ),
        ["`chosen` of row 0", "['from', 'value']"],
    ),
    "token ids": (of(chosen=[[4, 5]] * 16), ["`chosen` of row 0", "[4, 5]"]),
    "numbers": (of(chosen=[1] * 16), ["`chosen` of row 0 is 1"]),
    "an empty side, and no prompt": (of(prompt=None, chosen=[""] * 16), ["row 0", "empty side", "`prompt`"]),
    "no messages": (
        of(prompt=[said("w1", "user")] * 16, chosen=[[], *[said("w1")] * 15], rejected=[said("w2")] * 16),
        ["`chosen` of row 0", "empty list"],
    ),
    "template arguments as text": (of(chat_template_kwargs=["think"] * 16), ["`chat_template_kwargs`", "'think'"]),
    "images for a tokenizer": (of(image=["x"] * 16), ["images", "processing_class"]),
    "no chat template": (
        lambda: build(
            train_dataset=pairs(prompt=None, chosen=[said("w1")] * 16, rejected=[said("w2")] * 16),
            processing_class=without("chat_template"),
        ),
        ["processing_class", "chat template"],
    ),
    "no end of text": (lambda: build(processing_class=without("eos_token")), ["processing_class", "eos_token"]),
    "evaluation without pairs": (lambda: build(eval_dataset=tiny.prompts()), ["eval_dataset has no column 'chosen'"]),
    "evaluation of several": (
        lambda: build(eval_dataset={"a": pairs(), "b": pairs(chosen=None)}),
        ["eval_dataset['b']", "'chosen'"],
    ),
    "evaluation of a list": (lambda: build(eval_dataset=[{"chosen": "w1"}]), ["eval_dataset is ["]),
    "evaluation without data": (lambda: build({"eval_strategy": "epoch"}), ["eval_strategy='epoch'"]),
    "a stream without max_steps": (
        lambda: build({"max_steps": -1}, train_dataset=pairs().to_iterable_dataset()),
        ["max_steps=-1"],
    ),
    "nothing left of the rows": (
        lambda: build({"max_length": 2}, model=tiny.qwen2(), ref_model=tiny.qwen2()),
        ["max_length=2", "train_dataset"],
    ),
    "max_length": (lambda: build({"max_length": 0}), ["max_length=0"]),
    "an unknown loss": (lambda: build({"loss_type": "sigmoidd"}), ["loss_type='sigmoidd'", "'sigmoid'"]),
    "beta as text": (lambda: build({"beta": "0.1"}), ["beta='0.1'"]),
    "a weight": (lambda: build({"loss_weights": 1.0}), ["loss_weights=1.0", "[1.0]"]),
    "args: a dict": (lambda: build(args={}), ["`args`", "DPOConfig(**args)"]),
    "args: another method's": (lambda: build(args="args"), ["`args`", "not str"]),
    "a tokenizer by name": (lambda: build(processing_class="m"), ["processing_class is 'm'"]),
    "a classifier": (lambda: build(model=tiny.classifier()), ["Qwen2ForSequenceClassification"]),
    "an adapter as a dict": (lambda: build(peft_config={"r": 4}), ["peft_config is {'r': 4}"]),
    "a misspelt argument": (lambda: build(evaldataset=pairs()), ["'evaldataset'", "'eval_dataset'"]),
    "ids beyond the model's": (
        lambda: build(model=tiny.qwen2(vocab_size=5), ref_model=tiny.qwen2(vocab_size=5)),
        ["5 embeddings"],
    ),
    "a curriculum by name": (lambda: build(curriculum="easy_to_hard"), ["curriculum='easy_to_hard'"]),
    "a curriculum of anything": (lambda: build(curriculum=3), ["curriculum=3"]),
    "a curriculum without its column": (lambda: build(curriculum=DifficultyCurriculum(column="margin")), ["'margin'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_pairs(case):
    check(*CASES[case])
