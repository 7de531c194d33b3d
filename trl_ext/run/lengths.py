"""How long the rows of a data set are in the tokens of a model, before that model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import maybe_apply_chat_template, maybe_extract_prompt

from ..errors import require


PROMPT, SIDES, TEXTS = "prompt", ("chosen", "rejected"), ("completion", "text", "messages")


@dataclass(frozen=True)
class Lengths:
    """
    Tokens of the rows that were looked at.

    Attributes:
        rows (`int`):
            How many rows.
        whole (`bool`):
            Whether they are all rows there are.
        prompts (`list[int]`):
            Tokens of each prompt; empty where rows have none.
        answers (`list[int]`):
            Tokens of what follows: the longer one of a pair, a completion, or the whole text.
    """

    rows: int
    whole: bool
    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    @property
    def longest_prompt(self) -> int:
        return max(self.prompts, default=0)

    @property
    def longest_row(self) -> int:
        """Of a prompt and what follows it."""
        return max(self.totals, default=0)

    @property
    def totals(self) -> list[int]:
        """Tokens of each row: the prompt and what follows it."""
        if not self.prompts or not self.answers:
            return self.prompts or self.answers
        return [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]


def some_rows(data: Any, most: int) -> tuple[list[dict[str, Any]], bool]:
    """Up to `most` rows of a data set, from all over it, or the first ones of a stream; and whether these are all."""
    if isinstance(data, Dataset):
        step = max(1, -(-len(data) // most))
        return list(data.select(range(0, len(data), step))), step == 1
    rows = list(data.take(most + 1))
    return rows[:most], len(rows) <= most


def measure_lengths(data: Any, tokenizer: Any, most: int) -> Lengths:
    """
    Tokenizes some rows as trainers do.

    Args:
        data ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt`, `chosen` and `rejected`, `prompt` and `completion`, `text` or `messages`.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's.
        most (`int`):
            Most rows to look at.

    Raises:
        ValueError: if a row has none of these columns.
    """
    rows, whole = some_rows(data, most)
    texts = [maybe_apply_chat_template(maybe_extract_prompt(dict(row)), tokenizer) for row in rows]
    first = texts[0] if texts else {}
    answers = [column for column in (*SIDES, *TEXTS) if column in first]
    require(PROMPT in first or bool(answers), f"rows have none of the columns that are trained on, only {list(first)}")

    def tokens(column: str) -> list[int]:
        ids: Sequence[Any] = tokenizer([text[column] for text in texts], add_special_tokens=False)["input_ids"]
        return [len(row) for row in ids]

    counted = [tokens(column) for column in answers]
    return Lengths(
        len(rows),
        whole,
        tokens(PROMPT) if PROMPT in first else [],
        [max(row) for row in zip(*counted, strict=True)] if counted else [],
    )
