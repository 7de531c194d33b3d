"""Prompts that come as token ids."""

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

from trl_ext.rollouts.prompts import TokenizedPrompt, with_tokenized_prompts


IDS = [[5, 9], [7, 7, 4], [11]]
# As TRL 1.12's collator left them: padded on the left
PADDED = [[0, 5, 9], [7, 7, 4], [0, 0, 11]]
MASKS = [[0, 1, 1], [1, 1, 1], [0, 0, 1]]


def decode(ids: list[int]) -> str:
    text: str = tiny.tokenizer().decode(ids)
    return text


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": IDS},
        {"input_ids": PADDED, "attention_mask": MASKS},
        {"input_ids": IDS, "attention_mask": [[1] * len(ids) for ids in IDS]},
    ],
    ids=["ids", "padded", "masked"],
)
@pytest.mark.parametrize("tensors", [False, True])
def test_prompts_of_a_data_set(columns, tensors):
    dataset = Dataset.from_dict({**columns, "target": [1, 2, 3]})
    dataset = with_tokenized_prompts(dataset.with_format("torch") if tensors else dataset, decode)
    assert "prompt" in dataset.column_names
    for row, ids in zip(dataset, IDS, strict=True):
        assert row["prompt"] == decode(ids)
        assert row["prompt"].input_ids == ids
    assert [row["target"] for row in dataset] == [1, 2, 3]
    assert dataset[1]["prompt"].input_ids == IDS[1]


def test_a_padding_token_that_is_shown_stays():
    dataset = Dataset.from_dict({"input_ids": [[0, 5, 9]], "attention_mask": [[1, 1, 1]]})
    assert with_tokenized_prompts(dataset, decode)[0]["prompt"].input_ids == [0, 5, 9]


def test_a_selection_of_rows_and_of_columns():
    dataset = with_tokenized_prompts(Dataset.from_dict({"input_ids": IDS, "target": [1, 2, 3]}), decode)
    assert dataset.select([2])[0]["prompt"].input_ids == [11]
    assert list(dataset["target"]) == [1, 2, 3]
    assert dataset.remove_columns("target")[0]["prompt"].input_ids == [5, 9]


def test_without_the_columns_of_ids_there_is_still_a_prompt():
    # `remove_unused_columns=True` leaves the column `prompt` alone
    dataset = with_tokenized_prompts(Dataset.from_dict({"input_ids": IDS, "attention_mask": IDS}), decode)
    kept = dataset.remove_columns(["input_ids", "attention_mask"])
    assert [row["prompt"].input_ids for row in kept] == IDS


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_keeps_its_ids(copied: Any):
    prompt = copied(TokenizedPrompt("w1 w2", [5, 6]))
    assert prompt == "w1 w2" and prompt.input_ids == [5, 6]
    assert isinstance(prompt, str)


def test_ids_are_plain_numbers():
    dataset = Dataset.from_dict({"input_ids": [[5, 9]]}).with_format("torch")
    (prompt,) = (row["prompt"] for row in with_tokenized_prompts(dataset, decode))
    assert all(type(token) is int for token in prompt.input_ids)
    assert not torch.is_tensor(prompt)
