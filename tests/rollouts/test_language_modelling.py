"""Text as batches for a language model, token by token."""

import statistics
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional

from trl_ext.rollouts.language_modelling import language_modelling_batch


def batch(rows: list[dict[str, Any]], max_length: int = 100) -> dict[str, list[list[int]]]:
    made = language_modelling_batch(rows, tiny.tokenizer(), max_length, "cpu")
    return {name: tensor.tolist() for name, tensor in made.items()}


def test_text_and_ids():
    made = batch([{"text": "w0 w1"}, {"input_ids": [9, 8, 7, 6]}])
    assert made["input_ids"] == [[4, 5, 2, 0], [9, 8, 7, 6]]
    assert made["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert made["labels"] == [[4, 5, 2, -100], [9, 8, 7, 6]]


def test_of_a_prompt_only_the_completion_is_learned():
    made = batch([{"prompt": "w0 w1", "completion": " w2"}, {"prompt": "w0", "completion": " w2 w3 w4"}])
    assert made["input_ids"] == [[4, 5, 6, 2, 0], [4, 6, 7, 8, 2]]
    assert made["labels"] == [[-100, -100, 6, 2, -100], [-100, 6, 7, 8, 2]]


def test_messages():
    prompt, completion = [{"role": "user", "content": "w3"}], [{"role": "assistant", "content": "w4"}]
    whole = batch([{"messages": prompt + completion}])
    assert whole["labels"] == whole["input_ids"] == [[7, 8]]
    # This template opens an answer with w0, which the whole conversation doesn't have
    apart = batch([{"prompt": prompt, "completion": [{"role": "assistant", "content": "w0 w4"}]}])
    assert apart["input_ids"] == [[7, 4, 8]]
    assert apart["labels"] == [[-100, -100, 8]]


def test_long_rows_are_cut_and_keep_something_to_learn():
    made = batch(
        [
            {"text": "w0 w1 w2 w3"},
            {"prompt": "w0 w1 w2 w3", "completion": " w4"},
            {"prompt": "w0", "completion": " w4 w5 w6 w7"},
        ],
        max_length=3,
    )
    assert made["input_ids"] == [[4, 5, 6], [7, 8, 2], [8, 9, 10]]
    assert made["labels"] == [[4, 5, 6], [-100, 8, 2], [8, 9, 10]]


def test_the_loss_is_the_mean_over_what_is_learned():
    rows = [{"prompt": "w0 w1", "completion": " w2"}, {"prompt": "w3", "completion": " w2 w3 w4"}]
    model = tiny.qwen2()
    loss = model(**language_modelling_batch(rows, tiny.tokenizer(), 100, "cpu")).loss
    terms = []
    for ids, start in (([4, 5, 6, 2], 2), ([7, 6, 7, 8, 2], 1)):
        logits = model(torch.tensor([ids])).logits[0, :-1]
        terms += functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[start - 1 :].tolist()
    assert loss.item() == pytest.approx(statistics.fmean(terms), rel=1e-5)
