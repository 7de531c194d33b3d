"""Tokens of rows of every form, and which rows are looked at."""

import pytest
import tiny
from datasets import Dataset

from trl_ext.run.lengths import measure_lengths, some_rows


def measured(rows: list[dict], most: int = 100):
    return measure_lengths(Dataset.from_list(rows), tiny.tokenizer(), most)


def message(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def test_prompts():
    found = measured([{"prompt": "w1 w2"}, {"prompt": "w1 w2 w3 w4"}])
    assert (found.prompts, found.answers, found.longest_prompt, found.longest_row) == ([2, 4], [], 4, 4)
    assert found.whole


def test_conversations_count_what_the_template_adds():
    assert measured([{"prompt": message("w1 w2")}]).prompts == [3]  # w0, where the answer begins


def test_pairs_count_their_longer_side():
    found = measured([{"prompt": "w1", "chosen": " w2", "rejected": " w2 w3"}])
    assert (found.prompts, found.answers, found.longest_row) == ([1], [2], 3)


def test_pairs_with_the_prompt_in_them():
    rows = [
        {"chosen": message("w1") + message("w2", "assistant"), "rejected": message("w1") + message("w3", "assistant")}
    ]
    found = measured(rows)
    assert found.prompts[0] >= 1 and found.answers[0] >= 1


def test_text():
    assert measured([{"text": "w1 w2 w3"}]).totals == [3]


def test_rows_without_anything_to_train_on():
    with pytest.raises(ValueError, match="none of the columns"):
        measured([{"question": "w1"}])


def test_rows_from_all_over_a_data_set_and_the_first_of_a_stream():
    data = Dataset.from_dict({"prompt": [f"w{i}" for i in range(10)]})
    rows, whole = some_rows(data, 4)
    assert [row["prompt"] for row in rows] == ["w0", "w3", "w6", "w9"] and not whole
    assert some_rows(data, 10)[1]
    rows, whole = some_rows(data.to_iterable_dataset(), 4)
    assert [row["prompt"] for row in rows] == ["w0", "w1", "w2", "w3"] and not whole
    assert some_rows(data.to_iterable_dataset(), 10)[1]
