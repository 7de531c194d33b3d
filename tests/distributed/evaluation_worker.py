"""Evaluates sets that no batch size divides, on however many processes it was started with."""

import os
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from distributed.dpo_worker import pairs
from distributed.worker import digest

import trl_ext


# Per process: on one process, the whole set is one batch
PROMPTS, PAIRS = 7, 9
GRPO_CASES: dict[str, dict[str, Any]] = {
    # 21 completions in groups of 3: groups lie across processes, and one is left over
    "groups": {"num_generations_eval": 3, "per_device_eval_batch_size": 3},
    "single": {"num_generations_eval": 1, "per_device_eval_batch_size": 2},
    "pairs_of_rows": {"num_generations_eval": 2, "per_device_eval_batch_size": 4, "loss_type": "grpo"},
}


def by_place(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of 2 to 10 tokens that depend on the prompt and the place in its group, on nothing else."""
    size, start = trainer.num_generations_eval, trainer.accelerator.process_index * len(prompts)
    completions = []
    for i, prompt in enumerate(prompts):
        number = digest(f"{prompt} {(start + i) % size}")
        ids = [4 + (number >> 8 * k) % 20 for k in range(2 + number % 9)]
        completions.append([*ids, 2] if number % 3 else ids)
    prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def applies_to_some(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if ids[0] % 3 == 0 else float(len(ids)) for ids in completion_ids]


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock decides."""
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}


def grpo(trainer_class: type, directory: Any, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A trainer that evaluates completions which depend on their prompts alone."""
    given = {"eval_dataset": tiny.prompts(PROMPTS), "rollout_func": by_place, **(arguments or {})}
    return tiny.trainer(trainer_class, directory, [tiny.hashed, applies_to_some], given, **settings)


def dpo(trainer_class: type, config_class: type, directory: Any, batch_size: int, evaluated: Any = None) -> Any:
    return trainer_class(
        tiny.qwen2(),
        ref_model=tiny.qwen2(3),
        args=config_class(**tiny.pair_settings(directory, per_device_eval_batch_size=batch_size)),
        train_dataset=pairs(4),
        eval_dataset=pairs(PAIRS) if evaluated is None else evaluated,
        processing_class=tiny.tokenizer(),
    )


def main(directory: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    whole = {"per_device_eval_batch_size": 3 * PROMPTS * 2} if processes == 1 else {}
    found = {
        name: numbers(grpo(trl_ext.GRPOTrainer, directory / name, **{**case, **whole}).evaluate())
        for name, case in GRPO_CASES.items()
    }
    trainer = dpo(trl_ext.DPOTrainer, trl_ext.DPOConfig, directory / "dpo", PAIRS if processes == 1 else 2)
    found["dpo"] = numbers(trainer.evaluate())
    torch.save(found, directory / f"evaluated_{processes}_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    tiny.leave()
