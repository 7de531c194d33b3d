"""
What do two processes bring? DAPO with refill on one process and on two (DDP over gloo, one thread each), on the same
global batch: the same prompts, drawn in the same order, of which half are dead, and completions of which nearly all
have the same length (a random model hardly ever ends one), so that both sides do the same work, to a few percent.

The sides are alive at the same time and take turns after every step, as in `ppo.py`. Tokens a second are the generated
tokens of a step over its wall-clock time; the ratio is the median over pairs of steps. `collectives` is the share of a
step's time that a process spends in collectives, waiting for the other and passing data: in torch's functions, and at
the end of a backward pass in DDP's average of the last bucket of gradients.

```shell
python benchmarks/two_processes.py --report --json
```
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from turns import Clock, quiet_environment, take_turns, wait_for_turn
from words import word_tokenizer


# Nothing heavy is imported here: what a side imports is its own, and is measured

SIDES = {"one process": 1, "two processes": 2}
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter_tensor",
)
VOCABULARY, GROUP = 1_000, 8
SIZES: dict[str, dict[str, int]] = {
    "full": {"hidden": 128, "layers": 4, "prompts": 16, "prompt": 32, "completion": 48},
    "tiny": {"hidden": 16, "layers": 1, "prompts": 4, "prompt": 4, "completion": 4},
}


class Collectives:
    """Seconds that this process spends in collectives."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # one that is made of others
                return function(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds += time.perf_counter() - began

        return timed

    def watch(self) -> None:
        import torch.distributed

        for name in COLLECTIVES:
            setattr(torch.distributed, name, self.around(getattr(torch.distributed, name)))

    def average(self, state, bucket):  # type: ignore[no-untyped-def] # DDP refuses other types than its own
        """A hook for DDP: its own average of gradients, whose last bucket nothing is computed beside."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        began = time.perf_counter()

        def done(future: Any) -> Any:
            if bucket.is_last():
                self.seconds += time.perf_counter() - began
            return future.value()

        return allreduce_hook(None, bucket).then(done)


def live(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Variance for every other prompt, which follows from the prompt alone."""
    return [
        float(int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 2 == 0 and sum(ids) % 2 == 0)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def policy(size: dict[str, int]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size["hidden"],
        intermediate_size=2 * size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def train(size: dict[str, int], processes: int, steps: int) -> dict[str, Any]:
    """Trains for one step of warm-up and `steps` more, and returns what each took."""
    import torch
    from accelerate.utils import gather_object
    from datasets import Dataset
    from transformers import TrainerCallback

    from trl_ext import DAPOConfig, DAPOTrainer

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (64 * size["prompts"], size["prompt"]), generator=generator).tolist()
    rows = size["prompts"] * GROUP // processes  # of a process, in two micro-batches

    def wait() -> None:
        """All processes of a side: those that don't wait themselves would go on until the next collective."""
        if int(os.environ.get("RANK", "0")) == 0:
            wait_for_turn()
        if processes > 1:
            torch.distributed.barrier()

    clock, collectives = Clock(wait), Collectives()
    collectives.watch()
    found: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if processes > 1:
                trainer.model_wrapped.register_comm_hook(None, collectives.average)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            waited, tokens = collectives.seconds, sum(trainer.train_metrics["selection/generated_tokens"])
            clock.end_step()
            collectives.seconds = 0.0  # without the wait for a turn
            found.append({"waited": waited, "generated": tokens})

    with tempfile.TemporaryDirectory() as directory:
        config = DAPOConfig(
            directory,
            per_device_train_batch_size=rows // 2,
            gradient_accumulation_steps=2,
            updates_per_generation=1,
            num_generations=GROUP,
            max_completion_length=size["completion"],
            max_refill_rounds=8,
            mask_truncated_completions=False,  # which nearly all are
            soft_punish_cache=0,
            max_steps=1 + steps,
            learning_rate=1e-6,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1_000,
            seed=0,
        )
        dataset = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids]})
        trainer = DAPOTrainer(
            model=policy(size),
            reward_funcs=live,
            args=config,
            train_dataset=dataset,
            processing_class=word_tokenizer(VOCABULARY),
            callbacks=[Watch()],
        )
        assert trainer.accelerator.num_processes == processes
        clock.follow(trainer)
        trainer.train()
    steps_here = [{**step, **more} for step, more in zip(clock.steps, found[1:], strict=True)]
    # CPU-seconds of all processes; the others would count the first one's turns as waiting
    of_all = gather_object([[step["cpu_seconds"] for step in steps_here]])
    together = map(sum, zip(*of_all, strict=True))
    return {"steps": [{**step, "cpu_seconds": cpu} for step, cpu in zip(steps_here, together, strict=True)]}


def run_side(size: dict[str, int], processes: int, steps: int) -> None:
    """One process of a side. The first of them says on stdout when it waits, and in the end what it measured."""
    import torch

    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):  # what trainers print
        found = train(size, processes, steps)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found), flush=True)
    os._exit(0)  # threads of gloo can abort Python's own end


def command_of(processes: int, size: str, steps: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(Path(__file__).resolve()), "--side", str(processes), "--size", size, "--steps", str(steps)]
    return [sys.executable, *(launcher if processes > 1 else []), *script]


def table(rounds: list[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """As Markdown, and the numbers that matter."""

    def values(side: str, of_step: Callable[[dict[str, float]], float]) -> list[float]:
        return [of_step(step) for runs in rounds for step in runs[side]["steps"]]

    lines = [
        "| | seconds a step | generation | training | CPU-seconds, all processes | tokens a second | collectives |",
        "|---|---|---|---|---|---|---|",
    ]
    speeds, shares = {}, {}
    for side in SIDES:
        seconds, generation, training, cpu = (
            statistics.median(values(side, lambda step, name=name: step[name]))
            for name in ("seconds", "generation", "training", "cpu_seconds")
        )
        speeds[side] = values(side, lambda step: step["generated"] / step["seconds"])
        shares[side] = statistics.median(values(side, lambda step: step["waited"] / step["seconds"]))
        lines.append(
            f"| {side} | {seconds:.2f} | {generation:.2f} | {training:.2f} | {cpu:.2f} | "
            f"{statistics.median(speeds[side]):,.0f} | {shares[side]:.0%} |"
        )
    one, two = SIDES
    ratios = [after / before for after, before in zip(speeds[two], speeds[one], strict=True)]
    lines += [
        "",
        f"Tokens a second, two processes over one: {statistics.median(ratios):.2f} (median of {len(ratios)} pairs of "
        f"steps; from {min(ratios):.2f} to {max(ratios):.2f}).",
    ]
    return "\n".join(lines), {"ratio": round(statistics.median(ratios), 3), "collectives": round(shares[two], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="launches of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a launch, after one of warm-up (default: 5)")
    parser.add_argument("--size", choices=SIZES, default="full", help="of model and batch (default: full)")
    parser.add_argument("--side", type=int, help="one process of so many, in which a step waits for a line of input")
    parser.add_argument("--report", action="store_true", help="write the table into RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    if args.side is not None:
        run_side(SIZES[args.size], args.side, args.steps)
        return
    commands = {side: command_of(processes, args.size, args.steps) for side, processes in SIDES.items()}
    rounds = [take_turns(commands, dict.fromkeys(SIDES, quiet_environment()), args.steps) for _ in range(args.rounds)]
    generated = {side: [step["generated"] for runs in rounds for step in runs[side]["steps"]] for side in SIDES}
    text, numbers = table(rounds)
    print(text)
    if args.report:
        from learning_report import write_report

        write_report(Path(__file__).name, "throughput", text)
    mean = {side: statistics.mean(tokens) for side, tokens in generated.items()}
    numbers["work"] = round(mean["two processes"] / mean["one process"], 3)
    print(json.dumps(numbers) if args.json else numbers)


if __name__ == "__main__":
    main()
