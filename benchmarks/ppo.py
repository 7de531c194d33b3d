"""
What does a PPO step cost: `trl_ext.PPOTrainer` against the last `PPOTrainer` that TRL had, 1.12's?

The script installs TRL 1.12 into an environment of its own, once, with everything else as in requirements.lock. Each
run is a process of its own that trains random models: 32 prompts × 16 tokens, 32 new tokens, 4 epochs over them in one
micro-batch of 32, full weights, float32, one thread, no gradient checkpointing. There are three sides: theirs, ours
with a value head (`head`), ours with a value model (`model`). A run of each is alive at the same time and they take
turns after every step, so that whatever slows the machine down falls on all; ratios are medians over pairs of steps.

Equal on all sides: weights of policy, reference and reward model (and of the value model, where there is one),
prompts, settings, optimizer, the number of updates, and the length of completions: the tokens for padding and for the
end are none that the models know. Not equal: `head` has no value model, and ours computes the log-probabilities of its
completions in a pass of its own, where 1.12 keeps the logits of generation.

Time is that of a whole step (generation, scoring, four updates), after one step of warm-up: `generation` is sampling,
`training` the updates, and the rest goes through reference, reward model and critic. Memory is the peak of the
resident set in a run beyond that after the imports; a step on tiny models comes first, for what is imported late.

```shell
python benchmarks/ppo.py --json
```
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from turns import Clock, Memory, quiet_environment, take_turns, wait_for_turn


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
SHAPES = {"full": SHAPE, "tiny": TINY}


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
    variables = quiet_environment()
    if side == "theirs":
        variables.pop("PYTHONPATH", None)  # packages of ours
    return variables


# What happens in the process of a side


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
        "max_grad_norm": 0.0,  # 1.12 never clips
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def train_theirs(steps: int, shape: dict[str, Any], clock: Clock) -> None:
    """TRL 1.12's trainer."""
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    generate = ppo_trainer.batch_generation

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


def train_ours(steps: int, shape: dict[str, Any], clock: Clock, critic: str) -> None:
    """Ours."""
    from transformers import TrainerCallback

    from trl_ext import PPOConfig, PPOTrainer

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % EPOCHS == 0:
                clock.end_step()

    with tempfile.TemporaryDirectory() as directory:
        config = PPOConfig(**settings(directory, steps), critic=critic, logging_steps=EPOCHS)  # 1.12 logs every step
        given = arguments(shape, with_value_model=critic == "model")
        given["processing_class"].pad_token = "w0"  # ours refuses one that no model knows; nothing is ever padded
        trainer = PPOTrainer(args=config, callbacks=[Watch()], **given)
        clock.follow(trainer)
        trainer.train()


def train(side: str, steps: int, shape: dict[str, Any]) -> None:
    """Train one side in this process. Says on stdout when it waits for a line, and in the end what it measured."""
    import torch

    torch.set_num_threads(1)
    run = train_theirs if side == "theirs" else partial(train_ours, critic=side)

    clock = Clock(wait_for_turn)
    with redirect_stdout(sys.stderr):  # what trainers print
        run(1, TINY, Clock(lambda: None))
        memory = Memory()
        run(1 + steps, shape, clock)
    print(json.dumps({"steps": clock.steps, "memory": memory.peak}))


# What happens in the main process


def measure(pythons: dict[str, str], steps: int, shape: str) -> dict[str, dict[str, Any]]:
    script = str(Path(__file__).resolve())
    commands = {
        side: [python, script, "--side", side, "--steps", str(steps), "--shape", shape]
        for side, python in pythons.items()
    }
    return take_turns(commands, {side: environment_of(side) for side in pythons}, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, after one of warm-up (default: 4)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all; ratios need theirs")
    parser.add_argument("--shape", choices=SHAPES, default="full", help="of the models (default: full)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where TRL 1.12 is, or is put")
    parser.add_argument("--side", choices=SIDES, help="train this side in this process, a step for each line of input")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    if args.side is not None:
        train(args.side, args.steps, SHAPES[args.shape])
        return

    pythons = dict.fromkeys(args.sides, sys.executable)
    if "theirs" in pythons:
        pythons["theirs"] = python_with_trl_1_12(args.environment)
    rounds = [measure(pythons, args.steps, args.shape) for _ in range(args.rounds)]

    def values(side: str, name: str) -> list[float]:
        """Of every step, or of every run."""
        if name == "memory":
            return [runs[side]["memory"] for runs in rounds]
        return [step[name] for runs in rounds for step in runs[side]["steps"]]

    def ratio(side: str, name: str) -> float:
        pairs = zip(values(side, name), values("theirs", name), strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    columns = {
        "seconds": ("s/step", "time_ratio"),
        "generation": ("generation", "generation_ratio"),
        "training": ("training", "training_ratio"),
        "cpu_seconds": ("CPU-s/step", "cpu_time_ratio"),
        "memory": ("MB", "memory_ratio"),
    }
    print(f"{'':>8}" + "".join(f"{head:>12}" for head, _ in columns.values()))
    for side in pythons:
        medians = [statistics.median(values(side, name)) for name in columns]
        print(f"{side:>8}" + "".join(f"{median:>12.3f}" for median in medians))
    compared = [side for side in pythons if side != "theirs" and "theirs" in pythons]
    result = {side: {key: ratio(side, name) for name, (_, key) in columns.items()} for side in compared}
    for side, ratios in result.items():
        print(f"{side} over theirs: " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
