"""
Small random runs of DAPO and DUPO with random rewards, one after another, on however many processes it was started
with: `random_worker.py OUTPUT SEED COUNT`. Rewards are those of a live group, of a dead one, `None` or nan, for whole
batches or single completions, on all processes or on some. Writes what each process trained on and ended with.
"""

import hashlib
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from refused import refusal

import trl_ext


SECONDS = 120  # that processes wait for each other
METHODS = {"DAPO": trl_ext.DAPOTrainer, "DUPO": trl_ext.DUPOTrainer}
NAN = 0.02  # of the calls of a reward function on a process

# What one completion gets, given a random number in [0, 1)
KINDS: dict[str, Any] = {
    "live": lambda number: float(number > 0.5),
    "rare": lambda number: float(number > 0.9),
    "dead": lambda number: 0.0,
    "solved": lambda number: 1.0,
    "not applicable": lambda number: None,
    "sometimes not applicable": lambda number: None if number < 0.3 else float(number > 0.6),
}


def sizes(draw: random.Random, processes: int) -> dict[str, Any]:
    """A generation batch of at least two groups, which processes may share in the middle of one."""
    while True:
        chosen: dict[str, Any] = {
            "per_device_train_batch_size": draw.randint(1, 6),
            "gradient_accumulation_steps": draw.randint(1, 3),
            "updates_per_generation": draw.randint(1, 2),
            "num_generations": draw.randint(2, 4),
        }
        per_device, accumulation, updates, group = chosen.values()
        rows = processes * per_device * accumulation * updates
        if rows % group == 0 and rows >= 2 * group:
            return chosen


class RandomReward:
    """Draws for each call what its completions get, for all processes alike or for each its own."""

    __name__ = "random_reward"

    def __init__(self, seed: str, rank: int, finite: bool) -> None:
        self.seed, self.rank, self.finite, self.calls = seed, rank, finite, 0

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[Any]:
        shared = random.Random(f"{self.seed} {self.calls}")
        own = random.Random(f"{self.seed} {self.calls} {self.rank}")
        self.calls += 1
        kind = KINDS[(shared if shared.random() < 0.5 else own).choice(list(KINDS))]
        rewards = [kind(own.random()) for _ in completion_ids]
        if not self.finite and own.random() < NAN:
            rewards[own.randrange(len(rewards))] = float("nan")
        return rewards


def recorded(trainer_class: Any) -> Any:
    """Notes the rows of each micro-batch, and how many of them have an advantage."""

    class Recorded(trainer_class):  # type: ignore[misc, valid-type]
        def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
            self.dealt.append([len(batch["advantages"]) for batch in micro_batches])
            super().on_new_buffer(micro_batches)
            self.computed.append(len(micro_batches))

    return Recorded


def digest(model: torch.nn.Module) -> str:
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    assert weights.isfinite().all()
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()


def run(seed: str, output: Path, processes: int, rank: int) -> dict[str, Any]:
    draw = random.Random(f"{seed} {processes}")
    name = draw.choice(list(METHODS))
    settings = sizes(draw, processes) | {"num_iterations": draw.randint(1, 2), "max_steps": draw.randint(1, 3)}
    if name == "DAPO":
        settings |= {"max_refill_rounds": draw.randint(1, 3), "refill_draws": draw.choice(["blind", "informed"])}
    settings["fit_micro_batches"] = draw.random() < 0.7
    rewards = RandomReward(seed, rank, finite=draw.random() < 0.8)
    sizes_of_batch = ("per_device_train_batch_size", "gradient_accumulation_steps", "updates_per_generation")
    groups = processes * math.prod(settings[name] for name in sizes_of_batch) // settings["num_generations"]
    trainer = tiny.trainer(
        recorded(METHODS[name]),
        output,
        rewards,
        {"train_dataset": tiny.ragged(groups * draw.choice([1, 3]))},
        ddp_timeout=SECONDS,
        **settings,
    )
    trainer.dealt, trainer.computed = [], []
    assert trainer.accelerator.num_processes == processes
    found = {"method": name, "settings": settings, "error": None}
    try:
        trainer.train()
    except trl_ext.RewardFunctionError as error:
        found["error"] = str(error)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return found | {
        "dealt": trainer.dealt,
        "computed": trainer.computed,
        "steps": trainer.state.global_step,
        "weights": digest(policy),
        "moved": digest(policy) != digest(tiny.stopping()),
        "counters": trainer.counters,
    }


def refused(output: Path) -> str:
    """What is said of a generation batch of one completion a process, where a group has four."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "updates_per_generation": 1}
    return refusal(lambda: trl_ext.DUPOConfig(**tiny.cpu_settings(output, num_generations=4, **sizes)))


def main(output: Path, seed: str, count: int) -> None:
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.save(refused(output), output / f"refused_{processes}_{rank}.pt")
    found = []
    for number in range(count):
        print(f"run {number} of seed {seed} on {processes} processes", flush=True)
        found.append(run(f"{seed} {number}", output / f"run_{processes}_{number}", processes, rank))
        torch.save(found, output / f"found_{processes}_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    tiny.leave()
