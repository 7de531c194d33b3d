"""Trains DPO in an order, on however many processes it was started with, and writes what each process trained on."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext
from trl_ext.curriculum.schedule import DifficultyCurriculum


def pairs(count: int = 16, **columns: list[Any]) -> Dataset:
    """Row i asks for word i; what is chosen follows from it, what is rejected has another length."""
    words = tiny.WORDS
    return Dataset.from_dict(
        {
            "prompt": [f"w0 w1 {words[i % 20]}" for i in range(count)],
            "chosen": [f" {words[(3 * i + 1) % 20]} {words[(7 * i) % 20]}" for i in range(count)],
            "rejected": [f" {words[(5 * i + 2) % 20]}" for i in range(count)],
            **columns,
        }
    )


def settings(output_dir: Any, **overrides: Any) -> dict[str, Any]:
    """Micro-batches of 2 pairs, two to an optimizer step, on a CPU."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    return tiny.pair_settings(output_dir, **{**sizes, **overrides})


class Recorded(trl_ext.DPOTrainer):
    """Keeps the rows that it trained on, one list a micro-batch."""

    rows: list[list[int]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            chosen = inputs["input_ids"][: len(inputs["input_ids"]) // 2]
            self.rows.append([int(ids[2]) - 4 for ids in chosen])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.rows = []
        return super().train(*args, **kwargs)


def recorded(output_dir: Any, dataset: Dataset, curriculum: Any = None, **overrides: Any) -> Recorded:
    return Recorded(
        tiny.qwen2(),
        ref_model=tiny.qwen2(),
        args=trl_ext.DPOConfig(**settings(output_dir, **overrides)),
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
        curriculum=curriculum,
    )


def main(directory: Path) -> None:
    """Two epochs of 16 rows, by easiness, in micro-batches of 4 rows on all processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    dataset, curriculum = pairs(16, easy=[i // 4 for i in range(16)]), DifficultyCurriculum("easy_to_hard", "-easy")
    sizes = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 1, "max_steps": 8}
    # The gradient itself: Adam would make much of what rounding does to small ones
    trainer = recorded(directory / f"run_{processes}", dataset, curriculum, optim="sgd", **sizes)
    trainer.train()
    accelerator = trainer.accelerator
    torch.save(
        {"rows": trainer.rows, "weights": tiny.weights(accelerator.unwrap_model(trainer.model))},
        directory / f"dpo_{accelerator.num_processes}_{accelerator.process_index}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    tiny.leave()
