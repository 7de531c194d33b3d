"""
Prompts that come as token ids: text for whoever reads it (reward functions, logs), the ids for whoever generates.
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset


class TokenizedPrompt(str):
    """
    The text of a prompt, with the token ids it stands for: they are what is generated from, not the text's.

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
    A data set of `input_ids`, as TRL's earlier PPO trainer took it, with a column `prompt`. Padding that an
    `attention_mask` shows is left out.

    Args:
        dataset ([`~datasets.Dataset`]):
            With a column `input_ids`.
        decode (`Callable`):
            From token ids to text.
    """

    def kept(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        masks = rows.get("attention_mask") or [[1] * len(ids) for ids in rows["input_ids"]]
        pairs = zip(rows["input_ids"], masks, strict=True)
        return {"prompt": [[token for token, shown in zip(*pair, strict=True) if shown] for pair in pairs]}

    def prompts(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "prompt" not in rows:  # another column may be asked for alone
            return rows
        return {**rows, "prompt": [TokenizedPrompt(decode(ids), ids) for ids in rows["prompt"]]}

    # The ids stand in the column itself: `input_ids` is what a trainer may drop
    return dataset.with_format(None).map(kept, batched=True).with_transform(prompts)
