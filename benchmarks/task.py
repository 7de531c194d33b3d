"""
What the benchmarks train: the digit-sorting task of `recipes/tasks`, with everything built from a seed.
"""

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import DatasetDict


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.tasks.sort_digits import build_data, build_model, build_tokenizer, exact_match  # noqa: E402


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process of its own, which has imported what this one has and trained nothing."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


@dataclass
class TrainingTask:
    """
    Model, data and arguments that both sides of a comparison get.

    Args:
        task_set (`str`):
            Set of the sorting task.
        seed (`int`):
            Seed of data and initial weights.
        model_path (`str`, *optional*):
            A trained start; by default the model is untrained.
        train_size (`int`):
            Training prompts.
        test_size (`int`):
            Held-out prompts: the first ones of a seed, however many.
    """

    completion_tokens: ClassVar[int] = 18  # at most

    task_set: str = "N"
    seed: int = 0
    model_path: str | None = None
    reward_func: Any = exact_match
    train_size: int = 2048
    test_size: int = 512
    tokenizer: Any = field(init=False)
    data: DatasetDict = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.data = build_data(self.task_set, self.tokenizer, self.seed, 64, self.train_size, self.test_size)
        # What a difficulty column would say; an answer ends with the end-of-sequence token
        self.data = self.data.map(lambda row: {"digits": len(row["answer_ids"]) - 1} if row.get("answer_ids") else {})

    def arguments(self) -> dict[str, Any]:
        """Arguments of a trainer beside `args`."""
        return {
            "model": self.model_path or build_model(self.tokenizer, self.seed),
            "reward_funcs": self.reward_func,
            "train_dataset": self.data["train"],
            "processing_class": self.tokenizer,
        }

    def settings(self, output_dir: str, **overrides: Any) -> dict[str, Any]:
        """Arguments of a configuration: 32 prompts × 8 completions per generation, on a CPU."""
        return {
            "output_dir": output_dir,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 4,
            "num_generations": 8,
            "max_completion_length": self.completion_tokens,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "seed": self.seed,
            **overrides,
        }
