"""Streams whose rows end before the first optimizer step, or hold what no look at the first row could show."""

from typing import Any

import pytest
import tiny
from datasets import Dataset, IterableDataset
from refused import check

from trl_ext import DPOConfig, DPOTrainer, GRPOTrainer


PARTS = ["train_dataset is a stream that ended before the first optimizer step", "gradient_accumulation_steps"]


def train(dataset: Any, **settings: Any) -> Any:
    trainer = tiny.trainer(GRPOTrainer, "out", tiny.hashed, {"train_dataset": dataset}, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("rows", [0, 3])
def test_fewer_prompts_than_a_generation_batch(rows):
    stream = IterableDataset.from_generator(
        lambda: ({"prompt": f"w{i}"} for i in range(rows)), features=Dataset.from_dict({"prompt": ["w1"]}).features
    )
    check(lambda: train(stream), PARTS)


def test_fewer_micro_batches_than_an_optimizer_step():
    """Transformers would read the stream again, for ever."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    check(lambda: train(tiny.prompts(2).to_iterable_dataset(), **sizes), PARTS)


def test_fewer_pairs_than_an_optimizer_step():
    """Transformers would read the stream again, for ever."""
    pairs = Dataset.from_dict({"prompt": ["w1"] * 3, "chosen": [" w2"] * 3, "rejected": [" w3"] * 3})
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = DPOTrainer(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=DPOConfig(**tiny.pair_settings("out", **settings)),
        train_dataset=pairs.to_iterable_dataset(),
        processing_class=tiny.tokenizer(),
    )
    check(trainer.train, PARTS)


def test_a_stream_that_ends_later_ends_training():
    """As in transformers: its first pass has one generation batch of one step."""
    stream = tiny.prompts(4).to_iterable_dataset()
    assert train(stream, max_steps=1).state.global_step == 1


def test_a_prompt_that_is_missing_further_on():
    rows = [{"prompt": "w1", "target": 4}] * 3 + [{"prompt": None, "target": 4}]
    check(lambda: train(IterableDataset.from_generator(lambda: iter(rows))), ["`prompt` of row", "is None"])
