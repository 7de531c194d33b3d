"""
What a run reads of its data set before and in its first step, and what it keeps of it: as much with fifty times as
many prompts. Counted, because time says nothing on a busy machine; `benchmarks/many_prompts.py` measures a million.
"""

import pickle
from typing import Any

import pytest
import tiny
from datasets import Dataset

from trl_ext import DAPOTrainer, DifficultyCurriculum, GRPOTrainer


WORDS = tiny.WORDS


class Reads:
    """The format of a data set that counts how often something is read, and how many rows."""

    def __init__(self) -> None:
        self.times = self.rows = 0

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        self.times += 1
        self.rows += len(next(iter(rows.values())))
        return rows


def prompts(count: int, reads: Reads) -> Any:
    """Distinct prompts of four words, each with a number that says how hard it is."""
    texts = [" ".join(WORDS[i // 20**k % 20] for k in range(4)) for i in range(count)]
    data = Dataset.from_dict({"prompt": texts, "level": [i * 7 % count for i in range(count)]})
    return data.with_transform(reads)


# A trainer, its settings, its curriculum, and how often the whole of a column is read
CASES: dict[str, tuple[Any, dict[str, Any], Any, int]] = {
    "GRPO": (GRPOTrainer, {}, None, 0),
    "blind refill": (DAPOTrainer, {}, None, 0),
    "informed": (DAPOTrainer, {"refill_draws": "informed"}, None, 0),
    "informed, by a column": (
        DAPOTrainer,
        {"refill_draws": "informed", "similar_prompts_columns": ["level"]},
        None,
        1,
    ),
    "curriculum": (GRPOTrainer, {}, DifficultyCurriculum("frontier"), 0),
    "curriculum of a column": (GRPOTrainer, {}, DifficultyCurriculum("easy_to_hard", column="level"), 1),
}


@pytest.mark.train
@pytest.mark.parametrize("case", CASES)
def test_the_first_step_does_not_depend_on_the_size_of_the_data_set(case, tmp_path):
    kind, settings, curriculum, columns = CASES[case]
    found = {}
    for count in (1_000, 50_000):
        reads = Reads()
        given = {"train_dataset": prompts(count, reads)} | ({"curriculum": curriculum} if curriculum else {})
        settings = {"max_steps": 1, "remove_unused_columns": False, **settings}
        trainer = tiny.trainer(kind, tmp_path / str(count), tiny.hashed, given, **settings)
        trainer.train()
        found[count] = reads.times, reads.rows - columns * count, len(pickle.dumps(trainer.run_state()))
    times, rows, size = found[1_000]
    assert found[50_000][:2] == (times, rows) and times < 100
    assert found[50_000][2] == pytest.approx(size, rel=0.1)
