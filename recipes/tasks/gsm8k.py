"""
GSM8K (https://huggingface.co/datasets/openai/gsm8k) for chat models: rows into prompts, and an exact-match reward.

The data set's own `answer` column is a worked solution that ends in `#### 42`; the model is asked to end the same way.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Any


INSTRUCTION = "Think step by step, then end with a line that has only `#### ` and the answer as a plain number."
FINAL_ANSWER = re.compile(r"####\s*(.+)")


def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
    """For `--prepare_row`: adds a conversational `prompt` and the number it asks for, `final_answer`."""
    return {
        "prompt": [{"role": "user", "content": f"{row['question']}\n\n{INSTRUCTION}"}],
        "final_answer": str(read_number(row["answer"])),
    }


def correct_answer(completions: list[list[dict[str, str]]], final_answer: list[str], **kwargs: Any) -> list[float]:
    """
    Reward function: 1.0 where the last `####` is followed by the right number, 0.0 otherwise.

    Args:
        completions (`list[list[dict[str, str]]]`):
            Conversations of one assistant message each.
        final_answer (`list[str]`):
            Column that [`prepare_row`] adds.
    """
    answers = [read_number(completion[-1]["content"]) for completion in completions]
    return [
        float(answer is not None and answer == Decimal(right))
        for answer, right in zip(answers, final_answer, strict=True)
    ]


def read_number(text: str) -> Decimal | None:
    """The number after the last `####`, without its currency, separators and full stop; `None` if there is none."""
    found = FINAL_ANSWER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].strip().strip("$€£`*. ").replace(",", ""))
    except InvalidOperation:
        return None
