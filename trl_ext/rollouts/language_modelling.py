"""
Rows of text as batches for a causal language model: the text beside the rollouts that PPO-ptx trains on.
"""

from typing import Any

import torch


IGNORED = -100  # label of a token that isn't learned


def language_modelling_batch(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int, device: Any
) -> dict[str, torch.Tensor]:
    """
    Rows of text as a right-padded batch with labels. All tokens are learned or, where there are a prompt and a
    completion, those of the completion.

    Args:
        rows (`list[dict]`):
            Rows with `input_ids`, `text`, `messages`, or `prompt` and `completion`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        max_length (`int`):
            Number of tokens to which a row is cut.
        device (`torch.device` or `str`):
            Device of the batch.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, each of shape `(B, S)`.
    """
    parts = [_cut(*_tokenized(row, tokenizer), max_length) for row in rows]
    longest = max(len(ids) for ids, _ in parts)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, start in parts:
        missing = longest - len(ids)
        batch["input_ids"].append(ids + [0] * missing)
        batch["attention_mask"].append([1] * len(ids) + [0] * missing)
        batch["labels"].append([IGNORED] * start + ids[start:] + [IGNORED] * missing)
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def _tokenized(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of a row, and how many at the start are the prompt's."""
    end = [tokenizer.eos_token_id]
    if "input_ids" in row:
        return list(row["input_ids"]), 0
    if "messages" in row:
        return _conversation(row["messages"], tokenizer), 0
    if "text" in row:
        return tokenizer(text=row["text"])["input_ids"] + end, 0
    if isinstance(row["prompt"], list):  # of messages
        prompt = _conversation(row["prompt"], tokenizer, add_generation_prompt=True)
        return _conversation(row["prompt"] + row["completion"], tokenizer), len(prompt)
    prompt = tokenizer(text=row["prompt"])["input_ids"]
    return tokenizer(text=row["prompt"] + row["completion"])["input_ids"] + end, len(prompt)


def _conversation(messages: list[dict[str, Any]], tokenizer: Any, **kwargs: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    return ids


def _cut(ids: list[int], start: int, max_length: int) -> tuple[list[int], int]:
    """At most `max_length` tokens. A prompt loses its first tokens, so that something of the completion is left."""
    lost = min(start, max(len(ids) - max_length, 0))
    return ids[lost:][:max_length], start - lost
