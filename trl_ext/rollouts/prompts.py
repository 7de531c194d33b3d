"""
Prompts that are given as token ids. Reward functions and logs see them as text; generation starts from the ids.
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset


class TokenizedPrompt(str):
    """
    The text of a prompt that was given as token ids. Completions are generated from these ids; the text is not
    tokenized again.

    Attributes:
        input_ids (`list[int]`):
            Token ids, without padding.
    """

    input_ids: list[int]

    def __new__(cls, text: str, input_ids: list[int]) -> "TokenizedPrompt":
        prompt = super().__new__(cls, text)
        prompt.input_ids = input_ids
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizedPrompt, (str(self), self.input_ids)


def with_tokenized_prompts(dataset: Dataset, decode: Callable[[list[int]], str]) -> Dataset:
    """
    Add a column `prompt` to a data set of `input_ids`, as TRL's PPO trainer took it up to 1.12.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set with a column `input_ids`. If it has a column `attention_mask`, tokens with a 0 in it are padding
            and are left out of the prompt.
        decode (`Callable`):
            From token ids to text.

    Returns:
        [`~datasets.Dataset`]: its prompts are [`TokenizedPrompt`]s.
    """

    def without_padding(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        masks = rows.get("attention_mask") or [[1] * len(ids) for ids in rows["input_ids"]]
        pairs = zip(rows["input_ids"], masks, strict=True)
        return {"prompt": [[token for token, shown in zip(*pair, strict=True) if shown] for pair in pairs]}

    def with_text(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "prompt" not in rows:  # a different column may be read alone
            return rows
        return {**rows, "prompt": [TokenizedPrompt(decode(ids), ids) for ids in rows["prompt"]]}

    # The column `prompt` holds the ids itself, because a trainer may drop the column `input_ids`
    return dataset.with_format(None).map(without_padding, batched=True).with_transform(with_text)
