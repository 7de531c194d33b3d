"""
What does a PPO step cost: `trl_ext.PPOTrainer` against the last `PPOTrainer` that TRL had, 1.12's?

The script installs TRL 1.12 into an environment of its own, once, with everything else as in requirements.lock. Each
run is a process of its own that trains random models: 32 prompts × 16 tokens, 32 new tokens, 4 epochs over them in one
micro-batch of 32, full weights, float32, one thread, no gradient checkpointing. Runs take turns: theirs, ours with a
value head (`head`), ours with a value model (`model`).

Equal on all sides: weights of policy, reference and reward model (and of the value model, where there is one),
prompts, settings, optimizer, the number of updates, and the length of completions: the tokens for padding and for the
end are none that the models know. Not equal: `head` has no value model. Ours also clips gradients, and computes the
log-probabilities of its completions in a pass of its own, where 1.12 keeps the logits of generation.

Time is that of a whole step (generation, scoring, four updates), after one step of warm-up: `generation` is sampling,
`training` the updates, and the rest goes through reference, reward model and critic. Memory is the peak of the
resident set beyond that after the imports; a step on tiny models comes first, for what is imported late.

```shell
python benchmarks/ppo.py --json
```
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any


# Nothing heavy is imported here: what a side imports is its own, and is measured. The main process needs none of it.

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "runs" / "benchmarks" / "ppo" / "trl_1_12"
SIDES = ("theirs", "head", "model")
VOCABULARY, PROMPTS, PROMPT, COMPLETION, EPOCHS = 2000, 32, 16, 32, 4
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TINY = {**SHAPE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def python_with_trl_1_12(directory: Path = ENVIRONMENT) -> str:
    """The interpreter of an environment with TRL 1.12, and all else as in requirements.lock; made if it is missing."""
    python, ready = directory / "bin" / "python", directory / ".ready"
    if ready.exists():
        return str(python)
    print(f"Installing TRL 1.12 into {directory}, once.", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    locked = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("trl==")]
    constraints = directory / "constraints.txt"
    constraints.write_text("\n".join(locked) + "\n")
    torch = next(line for line in locked if line.startswith("torch=="))
    # torch goes first and by its exact version, as in the Makefile; TRL 1.12 doesn't say that its PPO wants pandas
    for wanted in ([torch], ["-c", str(constraints), "trl==1.12.0", "pandas"]):
        subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True, stdout=sys.stderr)
    ready.touch()
    return str(python)


def environment_of(side: str) -> dict[str, str]:
    """Environment variables of a run."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if side == "theirs":
        variables.pop("PYTHONPATH", None)  # packages of ours
    return variables


# What happens in the process of a side


def resident(field: str) -> float:
    """A field of this process's status, in MB: `VmRSS`, or `VmHWM` for its peak."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


class Memory:
    """Resident memory from now on. What was freed until now is given back first, or it would be used for nothing."""

    def __init__(self) -> None:
        gc.collect()
        with suppress(OSError, AttributeError):  # where there is glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = resident("VmRSS")
        with suppress(OSError):  # where the kernel doesn't allow it, a peak among the imports would be counted
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts over

    @property
    def peak(self) -> float:
        try:
            return resident("VmHWM") - self.before
        except StopIteration:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - self.before


class Clock:
    """Seconds of each step, and of generation and training in it."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []  # of steps: wall-clock, CPU
        self.generation: list[float] = []
        self.training: list[float] = []
        self.began_training: float | None = None

    def around_generation(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = generate(*args, **kwargs)
            self.generation.append(time.perf_counter() - began)
            return result

        return timed

    def begin_training(self, *_: Any) -> None:
        """May be called more than once a step."""
        if self.began_training is None:
            self.began_training = time.perf_counter()

    def end_step(self) -> None:
        now = time.perf_counter()
        assert self.began_training is not None
        self.training.append(now - self.began_training)
        self.began_training = None
        self.ends.append((now, time.process_time()))

    def medians(self) -> dict[str, float]:
        """Of the steps after the first."""
        assert len(self.generation) == len(self.training) == len(self.ends)
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self.ends)]
        seconds, cpu_seconds = zip(*steps, strict=True)
        parts = {"generation": self.generation[1:], "training": self.training[1:]}
        parts |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
        return {name: statistics.median(values) for name, values in parts.items()}


def arguments(shape: dict[str, Any], with_value_model: bool) -> dict[str, Any]:
    """Models, data and tokenizer that both trainers take under the same names."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
    )

    words = [f"w{i}" for i in range(VOCABULARY)]
    # No model knows the last two: completions have full length, and no token of theirs is taken for padding
    vocabulary = {word: i for i, word in enumerate([*words, "<pad>", "<eos>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )

    def seeded(model_class: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        return model_class(Qwen2Config(**shape, num_labels=1))

    given = {
        "model": seeded(Qwen2ForCausalLM, 0),
        "ref_model": seeded(Qwen2ForCausalLM, 0),
        "reward_model": seeded(Qwen2ForSequenceClassification, 1),
    }
    if with_value_model:
        given["value_model"] = seeded(Qwen2ForSequenceClassification, 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (8 * PROMPTS, PROMPT), generator=generator).tolist()
    return {**given, "train_dataset": Dataset.from_dict({"input_ids": ids}), "processing_class": tokenizer}


def settings(directory: str, steps: int) -> dict[str, Any]:
    """Settings that both configurations take under the same names."""
    return {
        "output_dir": directory,
        "total_episodes": steps * PROMPTS,
        "per_device_train_batch_size": PROMPTS,
        "gradient_accumulation_steps": 1,
        "num_ppo_epochs": EPOCHS,
        "num_mini_batches": 1,
        "response_length": COMPLETION,
        "temperature": 0.7,
        "learning_rate": 3e-6,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def train_theirs(steps: int, shape: dict[str, Any]) -> Clock:
    """TRL 1.12's trainer."""
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    clock, generate = Clock(), ppo_trainer.batch_generation

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end_step()

    with tempfile.TemporaryDirectory() as directory:
        config = PPOConfig(**settings(directory, steps), num_sample_generations=0)
        trainer = PPOTrainer(args=config, callbacks=[Watch()], **arguments(shape, with_value_model=True))
        # Policy and value model together are called by the updates alone
        trainer.model.register_forward_pre_hook(clock.begin_training)
        ppo_trainer.batch_generation = clock.around_generation(generate)
        trainer.train()
    ppo_trainer.batch_generation = generate
    return clock


def train_ours(steps: int, shape: dict[str, Any], critic: str) -> Clock:
    """Ours."""
    from transformers import TrainerCallback

    from trl_ext import PPOConfig, PPOTrainer

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % EPOCHS == 0:
                clock.end_step()

    with tempfile.TemporaryDirectory() as directory:
        config = PPOConfig(**settings(directory, steps), critic=critic, logging_steps=EPOCHS)  # 1.12 logs every step
        given = arguments(shape, with_value_model=critic == "model")
        trainer = PPOTrainer(args=config, callbacks=[Watch()], **given)
        trainer._generate_single_turn = clock.around_generation(trainer._generate_single_turn)
        score = trainer._generate_and_score_completions

        def scored(*args: Any, **kwargs: Any) -> Any:
            result = score(*args, **kwargs)
            clock.begin_training()
            return result

        trainer._generate_and_score_completions = scored
        trainer.train()
    return clock


def measured(side: str, steps: int) -> dict[str, float]:
    """Train one side in this process."""
    import torch

    torch.set_num_threads(1)
    train = train_theirs if side == "theirs" else partial(train_ours, critic=side)
    train(1, TINY)
    memory = Memory()
    clock = train(steps, SHAPE)
    return {**clock.medians(), "memory": memory.peak}


# What happens in the main process


def run(side: str, python: str, steps: int) -> dict[str, float]:
    """Train in a process of its own, and return what it measured."""
    command = [python, str(Path(__file__).resolve()), "--side", side, "--steps", str(steps)]
    done = subprocess.run(command, env=environment_of(side), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run, the first not counted (default: 5)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where TRL 1.12 is, or is put")
    parser.add_argument("--side", choices=SIDES, help="train this side in this process, and print what it took")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(measured(args.side, args.steps)))
        return

    pythons = dict.fromkeys(SIDES, sys.executable) | {"theirs": python_with_trl_1_12(args.environment)}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for round_ in range(args.rounds):
        for side in SIDES if round_ % 2 == 0 else reversed(SIDES):
            runs[side].append(run(side, pythons[side], args.steps))

    def median(side: str, name: str) -> float:
        return statistics.median(found[name] for found in runs[side])

    columns = {
        "seconds": ("s/step", "time_ratio"),
        "generation": ("generation", "generation_ratio"),
        "training": ("training", "training_ratio"),
        "cpu_seconds": ("CPU-s/step", "cpu_time_ratio"),
        "memory": ("MB", "memory_ratio"),
    }
    print(f"{'':>8}" + "".join(f"{head:>12}" for head, _ in columns.values()))
    for side in SIDES:
        print(f"{side:>8}" + "".join(f"{median(side, name):>12.3f}" for name in columns))

    def ratio(side: str, name: str) -> float:
        """Median over rounds: what slows the machine down is likely to slow down a whole round."""
        pairs = zip(runs[side], runs["theirs"], strict=True)
        return statistics.median(ours[name] / theirs[name] for ours, theirs in pairs)

    result = {side: {key: ratio(side, name) for name, (_, key) in columns.items()} for side in SIDES[1:]}
    for side, ratios in result.items():
        print(f"{side} over theirs: " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
