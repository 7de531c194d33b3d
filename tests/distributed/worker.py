"""
Runs every case on however many processes it was started with, and writes what each process trained on.

The completions are a fixed function of prompt and position in the group, so that one process and several are given
the same rollouts. Started by `test_processes.py` with torchrun, or with plain Python for one process.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext


# Every case: rows on all processes per micro-batch, and what the config says beside it. One optimizer step takes a
# whole generation batch, so that neither the deal into micro-batches nor the number of processes changes the gradient.
CASES: dict[str, dict[str, Any]] = {
    "all": {"rows": 8},
    "refill": {"rows": 8, "rollout_selection": "refill"},
    "duplicate": {"rows": 8, "rollout_selection": "duplicate"},
    # 3 groups of 4 on 2 processes of 6 rows: the second group stands on both
    "refill_spanning": {"rows": 6, "rollout_selection": "refill"},
    "duplicate_spanning": {"rows": 6, "rollout_selection": "duplicate"},
    # Groups of 3: one prompt alone can't give two processes equally many rows
    "refill_odd_groups": {"rows": 6, "rollout_selection": "refill", "num_generations": 3},
    # More than half of the groups stay dead: copies travel, and the rounds are used up
    "refill_capped": {"rows": 16, "rollout_selection": "refill", "max_refill_rounds": 1, "rare": True},
    "duplicate_rare": {"rows": 16, "rollout_selection": "duplicate", "rare": True},
    "leave_one_out": {"rows": 8, "rollout_selection": "refill", "advantage_estimator": "leave_one_out"},
    "batch_scaled_copies": {
        "rows": 16,
        "rollout_selection": "duplicate",
        "scale_rewards": "batch",
        "rare": True,
    },
}


LOGGED = ("selection/", "reward", "completions/", "num_tokens", "frac_reward_zero_std")


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def fixed_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on the prompt and the place in its group, on nothing else."""
    start = trainer.accelerator.process_index * len(prompts)
    completions = []
    for i, prompt in enumerate(prompts):
        number = digest(f"{prompt} {(start + i) % trainer.num_generations}")
        completions.append([4 + (number >> 8 * k) % 20 for k in range(1 + number % 5)] + [2])
    prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def rare_success(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Only some prompts have any success, so that most groups are dead."""
    return [
        float(digest(prompt) % 3 == 0 and ids[0] % 2 == 0) for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


class Recorder(trl_ext.GRPOTrainer):
    """Keeps the completions of the rows that enter the loss, and the advantage of each."""

    def on_rollouts(self, output: Any, selection: Any, rounds: Any) -> None:
        super().on_rollouts(output, selection, rounds)
        self.trained = getattr(self, "trained", [])
        for ids, mask, advantage in zip(
            output["completion_ids"], output["completion_mask"], output["advantages"], strict=True
        ):
            self.trained.append((tuple(ids[mask.bool()].tolist()), round(float(advantage), 5)))


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(case: dict[str, Any], output_dir: Path, processes: int) -> dict[str, Any]:
    settings = dict(case)
    rows, rare = settings.pop("rows"), settings.pop("rare", False)
    config = trl_ext.GRPOConfig(
        **tiny.cpu_settings(
            output_dir,
            per_device_train_batch_size=rows // processes,
            gradient_accumulation_steps=2,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=0.5,
            max_grad_norm=0.0,
            max_steps=2,
            **settings,
        )
    )
    trainer = Recorder(
        model=tiny.qwen2(),
        reward_funcs=rare_success if rare else tiny.first_token_even,
        args=config,
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
        rollout_func=fixed_rollouts,
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    return {
        "weights": weights(trainer),
        "trained": trainer.trained,
        "counters": trainer.counters,
        "logs": [
            {key: value for key, value in log.items() if key.startswith(LOGGED)} for log in trainer.state.log_history
        ],
    }


def resume(output_dir: Path, processes: int, checkpoint: str | None) -> dict[str, Any]:
    """DAPO over four steps with two updates a generation, from the start or from a checkpoint in mid-generation."""
    trainer = trl_ext.DAPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.first_token_even,
        args=trl_ext.DAPOConfig(
            **tiny.cpu_settings(
                output_dir,
                per_device_train_batch_size=16 // processes,
                gradient_accumulation_steps=1,
                updates_per_generation=2,
                max_steps=4,
                save_strategy="steps",
                save_steps=1,
            )
        ),
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return {"weights": weights(trainer), "run": trainer.run_state(), "step": trainer.state.global_step}


class FailsOnLastProcess:
    """A reward function that breaks on one process only, at its second call."""

    __name__ = "fails_on_last_process"

    def __init__(self, rank: int, last: int) -> None:
        self.fails = rank == last
        self.calls = 0

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.calls += 1
        if self.fails and self.calls == 2:
            raise KeyError("no such answer")
        return tiny.first_token_even(completion_ids)


def fail(output_dir: Path, processes: int) -> dict[str, Any]:
    config = trl_ext.DUPOConfig(**tiny.cpu_settings(output_dir, num_generations=4, per_device_train_batch_size=4))
    trainer = trl_ext.DUPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=FailsOnLastProcess(config.process_index, processes - 1),
        args=config,
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
    )
    config.max_steps = 9
    try:
        trainer.train()
    except trl_ext.RewardFunctionError as error:
        return {"error": str(error), "saved": [path.name for path in output_dir.glob("checkpoint-*")]}
    return {"error": None, "saved": []}


if __name__ == "__main__":
    results_dir = Path(sys.argv[1])
    # Before torch.distributed is there, the launcher's environment says how many
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = train(case, results_dir / f"out_{name}_{world}", world)
    whole = results_dir / f"out_whole_{world}"
    results["whole"] = resume(whole, world, None)
    results["resumed"] = resume(results_dir / f"out_resumed_{world}", world, str(whole / "checkpoint-3"))
    if world > 1:
        # The checkpoint that one process wrote
        alone = results_dir / "out_whole_1" / "checkpoint-3"
        results["other_world"] = resume(results_dir / "out_other_world", world, str(alone))
    results["fault"] = fail(results_dir / f"out_fault_{world}", world)
    torch.save(results, results_dir / f"results_{world}_{rank}.pt")
    if torch.distributed.is_initialized():  # a process that ends with it open can abort
        torch.distributed.destroy_process_group()
