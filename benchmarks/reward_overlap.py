"""
What is waited for a slow reward function: TRL's `GRPOTrainer` against `trl_ext.GRPOTrainer` with rewards in flight.

Both train the same tiny model on the same data from the same seed; the reward function takes 50 ms a completion, as a
judge behind a network does (it sleeps, and takes no CPU from generation). 8 prompts × 8 completions a step. Run in
turn, and then backwards: TRL with the function as it is (`trl`), and

- `ours`: `rewards_in_flight=8, generation_chunks=4`;
- `one_chunk`: `rewards_in_flight=8`: nothing is generated meanwhile, and the run is TRL's bit for bit;
- `one_at_a_time`: `rewards_in_flight=1, generation_chunks=4`: as slow as in TRL, but while the next are generated;
- `trl_async`: TRL with the function rewritten by the user as an async one that scores 8 completions at a time, as many
  as 8 groups in flight do. What TRL offers already.

Reported: ratios of the time of a step over `trl`'s, as medians over rounds with a bootstrap interval; whether the work
was equal (completions scored, tokens, weights where they must be equal); and how long is generated: TRL's is all that
overlap can save, and a chunk of a few prompts takes this model about as long as a whole batch.
`fit_micro_batches=False` throughout, so that nothing else differs.

```shell
python benchmarks/reward_overlap.py --json
```
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from functools import partial
from typing import Any

import torch
import trl
from overhead import interval, matching_tokens
from task import TrainingTask
from transformers import TrainerCallback

import trl_ext


PROMPTS, GROUP, IN_FLIGHT, CHUNKS = 8, 8, 8, 4


class Judge:
    """[`matching_tokens`], slowly: one completion after the other. Counts them."""

    __name__ = "judge"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.scored = 0
        self.lock = threading.Lock()

    def count(self, completions: int) -> None:
        with self.lock:
            self.scored += completions

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        for _ in completion_ids:
            time.sleep(self.seconds)
        self.count(len(completion_ids))
        return matching_tokens(completion_ids, **columns)


def made_async(judge: Judge) -> Any:
    """What a user of TRL's would write: as many completions at a time as there are calls in flight."""

    async def judge_async(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        free = asyncio.Semaphore(IN_FLIGHT)

        async def one() -> None:
            async with free:
                await asyncio.sleep(judge.seconds)

        await asyncio.gather(*(one() for _ in completion_ids))
        judge.count(len(completion_ids))
        return matching_tokens(completion_ids, **columns)

    return judge_async


class Clock(TrainerCallback):
    """The time between the begin of training and its end, without what is set up before."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def timed(func: Any, seconds: list[float]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = func(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result

    return call


ours = partial(trl_ext.GRPOConfig, fit_micro_batches=False)
# Trainer, configuration, and whether the function is async
SIDES: dict[str, tuple[Any, Any, bool]] = {
    "trl": (trl.GRPOTrainer, trl.GRPOConfig, False),
    "ours": (trl_ext.GRPOTrainer, partial(ours, rewards_in_flight=IN_FLIGHT, generation_chunks=CHUNKS), False),
    "one_chunk": (trl_ext.GRPOTrainer, partial(ours, rewards_in_flight=IN_FLIGHT), False),
    "one_at_a_time": (trl_ext.GRPOTrainer, partial(ours, rewards_in_flight=1, generation_chunks=CHUNKS), False),
    "trl_async": (trl.GRPOTrainer, trl.GRPOConfig, True),
}
SAME_AS_TRL = ("one_chunk", "trl_async")  # the others sample in other batches


def train(side: str, task: TrainingTask, steps: int, seconds_per_sample: float) -> dict[str, Any]:
    """One run."""
    trainer_class, config_class, is_async = SIDES[side]
    judge, clock, generating = Judge(seconds_per_sample), Clock(), list[float]()
    micro_batch = {"per_device_train_batch_size": PROMPTS * GROUP // 4, "gradient_accumulation_steps": 4}
    with tempfile.TemporaryDirectory() as output_dir:
        config = config_class(**task.settings(output_dir, num_generations=GROUP, max_steps=steps, **micro_batch))
        arguments = {**task.arguments(), "reward_funcs": made_async(judge) if is_async else judge}
        trainer = trainer_class(args=config, callbacks=[clock], **arguments)
        trainer._generate_single_turn = timed(trainer._generate_single_turn, generating)
        trainer.train()
    return {
        "seconds": clock.seconds / steps,
        "generating": sum(generating) / steps,
        "scored": judge.scored,
        "tokens": trainer.state.num_input_tokens_seen,
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
    }


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which each is run once (default: 5)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a run (default: 2)")
    parser.add_argument("--seconds-per-sample", type=float, default=0.05, help="of the function (default: 0.05)")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    task = TrainingTask(train_size=256)
    for side in SIDES:  # warm-up, not counted
        train(side, task, 1, 0.0)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for pair in range(args.pairs):
        for side in SIDES if pair % 2 == 0 else reversed(SIDES):
            runs[side].append(train(side, task, args.steps, args.seconds_per_sample))

    def ratio(side: str, over: str) -> dict[str, float]:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs[side], runs[over], strict=True)]
        low, high = interval(ratios)
        return {"": statistics.median(ratios), "_low": low, "_high": high}

    result: dict[str, Any] = {}
    for side in SIDES:
        if side != "trl":
            name = "ratio" if side == "ours" else f"ratio_{side}"
            result |= {f"{name}{suffix}": value for suffix, value in ratio(side, "trl").items()}
    for side in ("ours", "one_chunk"):
        result |= {f"{side}_over_trl_async{suffix}": value for suffix, value in ratio(side, "trl_async").items()}
    for side in SIDES:
        result[f"seconds_{side}"] = statistics.median(run["seconds"] for run in runs[side])
    for side in SIDES:
        result[f"seconds_generating_{side}"] = statistics.median(run["generating"] for run in runs[side])
    expected = PROMPTS * GROUP * args.steps
    result |= {
        "pairs": args.pairs,
        "steps": args.steps,
        "seconds_per_sample": args.seconds_per_sample,
        "samples_scored": expected,
        "samples_scored_equal": all(run["scored"] == expected for side in SIDES for run in runs[side]),
        **{f"tokens_{side}": runs[side][0]["tokens"] for side in SIDES},
        **{f"weights_equal_{side}": same_weights(runs[side][0], runs["trl"][0]) for side in SAME_AS_TRL},
    }
    for key, value in result.items():
        print(f"{key:>34}: {value:.4f}" if isinstance(value, float) else f"{key:>34}: {value}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
