"""A reward model on token ids against the model's own score of one completion at a time."""

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen2ForSequenceClassification,
)

from trl_ext.rewards.models import RewardModelOnIds
from trl_ext.rollouts.prompts import TokenizedPrompt


def reward_model() -> Any:
    torch.manual_seed(1)
    config = copy.deepcopy(tiny.qwen2().config)
    config.num_labels = 1
    return Qwen2ForSequenceClassification(config)


PROMPTS = [[5, 9], [7], [4, 4, 4, 8], [11, 12], [6]]
COMPLETIONS = [[8, 2], [9, 9, 9, 2], [2], [20, 21, 22, 23, 5, 7], [10, 2]]


def prompts() -> list[TokenizedPrompt]:
    # The text says something else: it must not be tokenised again
    return [TokenizedPrompt("w19 w19 w19", ids) for ids in PROMPTS]


def alone(model: Any) -> list[float]:
    rows = [torch.tensor([prompt + completion]) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        return [model(row).logits.item() for row in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_scores_of_the_last_tokens_in_the_order_of_the_rows(batch_size):
    model = reward_model()
    scores = RewardModelOnIds(model, "judge", 0, batch_size)(prompts=prompts(), completion_ids=COMPLETIONS)
    assert scores == pytest.approx(alone(model), rel=1e-5)


def test_absolute_positions():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    scores = RewardModelOnIds(model, "judge", 0, 3)(prompts=prompts(), completion_ids=COMPLETIONS)
    assert scores == pytest.approx(alone(model), rel=1e-4)


@pytest.mark.parametrize("pad", [0, 2, 13])
def test_whatever_rows_are_filled_up_with(pad):
    # The end of a completion may be the token that pads: it is still the last
    model = reward_model()
    scores = RewardModelOnIds(model, "judge", pad, 5)(prompts=prompts(), completion_ids=COMPLETIONS)
    assert scores == pytest.approx(alone(model), rel=1e-5)


def test_no_gradient_and_other_arguments_are_taken():
    model = reward_model()
    scorer = RewardModelOnIds(model, "judge", 0, 2)
    scores = scorer(prompts=prompts(), completion_ids=COMPLETIONS, completions=["…"] * 5, trainer_state=None)
    assert all(isinstance(score, float) for score in scores)
    assert scorer.__name__ == "judge"


def test_a_model_that_scores_otherwise_is_refused():
    config = BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=1
    )
    with pytest.raises(ValueError, match="BertForSequenceClassification has no layer `score`"):
        RewardModelOnIds(BertForSequenceClassification(config), "judge", 0, 1)
