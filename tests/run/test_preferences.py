"""Recipes that learn from pairs. Whole runs are in `tests/recipes`."""

import tiny
from datasets import Dataset

from trl_ext.run.preferences import as_policies_are_scored


def test_a_reward_model_reads_what_policies_have_scored():
    tokenizer = tiny.tokenizer()
    message = [{"role": "user", "content": "w1"}]
    texts = Dataset.from_dict({"prompt": ["w1 "], "chosen": ["w2"], "rejected": ["w3"]})
    whole = Dataset.from_dict({"chosen": ["w1 w2"], "rejected": ["w1 w3"]})
    messages = Dataset.from_dict({"prompt": [message], "chosen": [message], "rejected": [message]})
    given = {"texts": texts, "whole": whole, "messages": messages, "sft": Dataset.from_dict({"prompt": ["w1"]})}
    data = as_policies_are_scored(given, tokenizer)
    for split in ("texts", "whole"):
        # No end-of-sequence token
        assert [data[split][0][f"{name}_ids"] for name in ("chosen", "rejected")] == [[5, 6], [5, 7]]
    assert data["messages"].column_names == messages.column_names and data["sft"] is given["sft"]
    assert texts.column_names == ["prompt", "chosen", "rejected"]
    streamed = as_policies_are_scored({"train": texts.to_iterable_dataset().map(dict)}, tokenizer)
    assert next(iter(streamed["train"]))["chosen_ids"] == [5, 6]
