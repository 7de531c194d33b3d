"""
Does it pay to choose what comes next? Two studies on set N of the sorting task, from the supervised start:

- `prompts`: the order of prompts. GRPO on all weights, with the prompts as they are dealt and with each order of
  [`~trl_ext.curriculum.schedule.DifficultyCurriculum`]. The prompts are few, so that each is met several times.
- `stages`: DPO and then PPO, against PPO alone and DPO alone, on LoRA adapters. Pairs are the best and the worst of 8
  completions of the policy as it is, judged by the reward that PPO gets, and all 8 count as generated. DPO makes new
  pairs in every round; a round's reference is the policy that wrote them. In one arm, all completions of a prompt
  that differ in reward are in pairs, and the same completions fit PPO's critic before its first step. In the last one
  β is lower, too, and DPO ends when the reward of its policy on some other prompts no longer rises.

Every run generates 60 batches of 256 completions. The reward is exact match. What is measured is exact match, too,
sampled at temperature 1 on 512 held-out prompts (pass@1); tokens and CPU-seconds count everything but that
measurement.

```shell
python benchmarks/curriculum.py --seeds 5 --jobs 2 --report
```
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import torch
from datasets import disable_progress_bars
from learning_report import AXES, area, mean_interval, write_report
from learning_runs import Budget, Curve, TokenCounter, code_version, workers
from peft import LoraConfig, get_peft_model
from ppo_learning import start_of_outcome
from task import ROOT, TrainingTask
from transformers import AutoModelForCausalLM, PrinterCallback

import trl_ext
from trl_ext.curriculum.schedule import DifficultyCurriculum
from trl_ext.pipelines.dpo_then_ppo import DPOThenPPO
from trl_ext.preferences.pairs import make_pairs


mpl.use("Agg")

COMPLETIONS = 256  # of a generation batch
SAMPLES = 2  # completions for each held-out prompt
EPOCHS, MINI_BATCHES = 2, 2  # of a generation batch
ONLINE = {
    "per_device_train_batch_size": COMPLETIONS // MINI_BATCHES,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": MINI_BATCHES,
    "num_iterations": EPOCHS,
}
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
ADAPTER = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
# As in recipes/configs/quickstart_ppo.yaml
PPO = {
    **ONLINE,
    **ADAPTER,
    "num_generations": 1,
    "critic_head": "mlp",
    "critic_learning_rate": 3e-3,
    "critic_trunk_grad": 1.0,
    "vf_coef": 0.5,
    "cliprange_value": None,
    "reward_scaling": "running",
    "lam": 0.95,
    "critic_lam": 0.8,
    "kl_coef": 0.01,
}
DPO: dict[str, Any] = {
    **ADAPTER,
    "beta": 0.1,
    "loss_type": ["sigmoid", "sft"],
    "per_device_train_batch_size": 64,
    "num_train_epochs": 4,
    "max_length": 32,
}
SHARED = (
    *("output_dir", "use_cpu", "bf16", "gradient_checkpointing", "report_to", "save_strategy", "disable_tqdm"),
    *("logging_strategy", "seed"),
)
# An answer that doesn't stop is wrong, and never the better one
PAIRS: dict[str, Any] = {"num_generations": 8, "truncated": "reject", "batch_size": 128}
PROMPTS = 500  # of the study `prompts`

CURRICULA: dict[str, dict[str, Any] | None] = {
    "uniform": None,
    "frontier": {"schedule": "frontier"},
    "easy to hard": {"schedule": "easy_to_hard", "column": "digits"},
    "mixed": {"schedule": "mixed"},
}


@dataclass
class Schedule:
    """
    Args:
        rounds (`list[float]`):
            Of all generation batches, the share whose worth of completions is for pairs, by round.
        ppo (`float`):
            The share of PPO.
        pairs, dpo (`dict`):
            What differs from `PAIRS` and `DPO`.
        fit_critic (`int`):
            Passes over the completions of the pairs that fit PPO's critic.
        measured (`int`):
            Prompts on which DPO's policy is measured every 8 steps, 2 completions each, to end it by their reward. The
            tokens count, and so do those of the pipeline's three measurements before and after PPO.
    """

    rounds: list[float]
    ppo: float
    pairs: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    fit_critic: int = 0
    measured: int = 0


ALL_PAIRS: dict[str, Any] = {
    "pairs": {"strategy": "margin"},
    "dpo": {"weight_column": "pair_weight", "group_by_prompt": True, "beta": 0.03},
}
SCHEDULES: dict[str, Schedule] = {
    "PPO": Schedule([], 1.0),
    "DPO": Schedule([0.1] * 10, 0.0),
    "DPO then PPO": Schedule([0.2], 0.8),
    "all pairs, fitted critic": Schedule([0.1], 0.9, **ALL_PAIRS, fit_critic=2),
    "the same, ended by reward": Schedule(
        [0.1], 0.9, {"strategy": "margin"}, {**ALL_PAIRS["dpo"], "beta": 0.01, "num_train_epochs": 12}, 2, measured=64
    ),
}


@dataclass
class Size:
    """Generation batches of a run, and measurements of pass@1 on the way."""

    batches: int
    points: int


class StagesCurve(Curve):
    """[`Curve`] over trainers that follow each other on one model. They end by themselves."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps = self.before = 0  # optimizer steps in all, and those of earlier trainers
        self.mark = 0.0  # tokens at the next measurement
        self.pairs: list[int] = []

    def begin(self, model: Any) -> None:
        self.started = time.process_time()
        self.point(0, model)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.steps

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps = self.before + state.global_step
        if self.counter.tokens >= self.mark or state.global_step == state.max_steps:
            self.point(self.steps, model)

    def point(self, step: int, model: Any) -> None:
        super().point(step, model)
        self.mark = self.counter.tokens + self.budget.tokens / self.budget.points

    def sampled(self, pairs: int) -> None:
        """Pairs were made: tokens were generated, and the policy is what it was."""
        cpu = time.process_time() - self.started - self.evaluating
        self.pairs.append(pairs)
        self.points.append({**self.points[-1], "tokens": self.counter.tokens, "cpu": cpu})
        self.mark = self.counter.tokens + 1.0  # at the end of DPO, which generates none

    def watch(self, trainer: Any) -> None:
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)


def by_prompts(arm: str, start: Path, seed: int, directory: str, size: Size) -> dict[str, Any]:
    counter = TokenCounter()
    task = TrainingTask("N", seed, str(start), counter, PROMPTS)
    curve = Curve(task, counter, Budget(size.batches, float("inf"), size.points), SAMPLES)
    steps = EPOCHS * MINI_BATCHES * size.batches
    config = trl_ext.GRPOConfig(**task.settings(directory, **ONLINE, learning_rate=3e-4, max_steps=steps))
    chosen = CURRICULA[arm]
    curriculum = None if chosen is None else DifficultyCurriculum(**chosen)
    trainer = trl_ext.GRPOTrainer(args=config, callbacks=[curve], curriculum=curriculum, **task.arguments())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"points": curve.points}


def scheduled(arm: str, batches: int) -> tuple[list[int], int]:
    """Generation batches' worth of pairs in each round, and generation batches of PPO; a round has one at least."""
    schedule = SCHEDULES[arm]
    return [max(1, round(share * batches)) for share in schedule.rounds[:batches]], round(schedule.ppo * batches)


def by_stages(arm: str, start: Path, seed: int, directory: str, size: Size) -> dict[str, Any]:
    rounds, batches = scheduled(arm, size.batches)
    counter = TokenCounter()
    task = TrainingTask("N", seed, str(start), counter, 8192)
    budget = Budget(size.batches, COMPLETIONS * size.batches * 8.0, size.points)  # about 8 tokens a completion
    curve = StagesCurve(task, counter, budget, SAMPLES)
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(start), LORA)
    curve.begin(model)
    if rounds and batches:
        dpo_then_ppo(task, curve, model, directory, rounds[0], batches, SCHEDULES[arm])
    elif rounds:
        dpo_alone(task, curve, model, directory, rounds)
    else:
        trainer = trl_ext.PPOTrainer(args=ppo_config(task, directory, batches), **{**task.arguments(), "model": model})
        curve.watch(trainer)
        trainer.train()
    return {"points": curve.points, "pairs": curve.pairs}


def ppo_config(task: TrainingTask, directory: str, batches: int) -> trl_ext.PPOConfig:
    return trl_ext.PPOConfig(**task.settings(directory, **PPO, max_steps=EPOCHS * MINI_BATCHES * batches))


def dpo_config(task: TrainingTask, directory: str, **overrides: Any) -> trl_ext.DPOConfig:
    settings = task.settings(directory)
    return trl_ext.DPOConfig(**{name: settings[name] for name in SHARED}, **{**DPO, **overrides})


def dpo_then_ppo(
    task: TrainingTask,
    curve: StagesCurve,
    model: Any,
    directory: str,
    size: int,
    batches: int,
    schedule: Schedule,
) -> None:
    arguments = task.arguments()

    def prepare(name: str, trainer: Any) -> None:
        if name == "dpo":
            curve.sampled(len(trainer.train_dataset))
        curve.watch(trainer)

    DPOThenPPO(
        model,
        arguments["reward_funcs"],
        arguments["train_dataset"],
        output_dir=directory,
        dpo_args=dpo_config(task, directory, **schedule.dpo),
        policy_args=ppo_config(task, directory, batches),
        pair_settings={**PAIRS, **schedule.pairs, "prompts": size * COMPLETIONS // PAIRS["num_generations"]},
        processing_class=task.tokenizer,
        accuracy_threshold=None,
        fit_critic=schedule.fit_critic,
        prepare=prepare,
        **measured_by(schedule, arguments["train_dataset"]),
    ).train()


def measured_by(schedule: Schedule, prompts: Any) -> dict[str, Any]:
    if not schedule.measured:
        return {}
    return {
        "held_out": prompts.select(range(len(prompts) - schedule.measured, len(prompts))),
        "held_out_samples": 2,
        "dpo_held_out_every": 8,
    }


def dpo_alone(task: TrainingTask, curve: StagesCurve, model: Any, directory: str, rounds: list[int]) -> None:
    policy = {**task.arguments(), "model": model}
    prompts = policy["train_dataset"].shuffle(seed=task.seed)
    for number, size in enumerate(rounds):
        count = size * COMPLETIONS // PAIRS["num_generations"]
        rows, prompts = prompts.take(count), prompts.skip(count)
        sampler = trl_ext.GRPOTrainer(args=trl_ext.GRPOConfig(**task.settings(directory)), **policy)
        pairs, _ = make_pairs(sampler, rows, **PAIRS, seed=10_000 * number + task.seed)
        curve.sampled(len(pairs))
        trainer: Any = trl_ext.DPOTrainer(
            model=model,
            args=dpo_config(task, directory),
            train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
            processing_class=task.tokenizer,
        )
        curve.watch(trainer)
        trainer.train()
        model.delete_adapter("ref")  # how the adapter began: TRL makes another one for the next round


class Study(NamedTuple):
    """What runs an arm, the arms, with which of them the others are compared, and over what means are taken."""

    run: Callable[[str, Path, int, str, Size], dict[str, Any]]
    arms: list[str]
    baselines: list[str]
    axes: list[str]
    title: str


STUDIES = {
    "prompts": Study(
        by_prompts, list(CURRICULA), ["uniform"], ["steps", "tokens"], "order of prompts (GRPO, all weights)"
    ),
    "stages": Study(
        by_stages, list(SCHEDULES), ["PPO", "DPO"], ["tokens", "cpu"], "stages (LoRA; tokens for pairs count)"
    ),
}
# Okabe and Ito's
COLOURS = {
    "uniform": "#000000",
    "frontier": "#D55E00",
    "easy to hard": "#0072B2",
    "mixed": "#009E73",
    "PPO": "#000000",
    "DPO": "#0072B2",
    "DPO then PPO": "#D55E00",
    "all pairs, fitted critic": "#009E73",
    "the same, ended by reward": "#CC79A7",
}


def over_seeds(values: list[float], sign: str = "") -> str:
    mean, half = mean_interval(values)
    return f"{mean:{sign}.3f} ± {half:.3f}"


def markdown(runs: dict[str, dict[int, dict[str, Any]]], study: Study) -> str:
    """A row an arm: mean over seeds and half-width of its 95 % t interval; then differences, paired by seed."""
    curves = {arm: {seed: run["points"] for seed, run in seeds.items()} for arm, seeds in runs.items()}
    shared = {axis: min(pts[-1][axis] for seeds in curves.values() for pts in seeds.values()) for axis in AXES}
    measures: dict[str, Callable[[list[dict[str, float]]], float]] = {
        "end": lambda points: points[-1]["pass@1"],
        f"at {shared['tokens'] / 1000:.1f}k tokens": lambda points: at_tokens(points, shared["tokens"]),
        # Up to what every run used
        **{f"mean over {AXES[axis]}": partial(area, axis=axis, budget=shared[axis]) for axis in study.axes},
    }
    found = {
        arm: {name: {seed: score(points) for seed, points in seeds.items()} for name, score in measures.items()}
        for arm, seeds in curves.items()
    }
    lines = [
        f"| | pass@1: start | {' | '.join(measures)} | end by seed | optimizer steps | tokens (k) | CPU-s |",
        "|---" * (len(measures) + 6) + "|",
    ]
    for arm, seeds in curves.items():
        last = [points[-1] for points in seeds.values()]
        cells = [
            arm,
            f"{np.mean([points[0]['pass@1'] for points in seeds.values()]):.3f}",
            *(over_seeds(list(values.values())) for values in found[arm].values()),
            ", ".join(f"{value:.3f}" for value in found[arm]["end"].values()),
            f"{np.mean([point['steps'] for point in last]):.0f}",
            f"{np.mean([point['tokens'] for point in last]) / 1000:.1f}",
            f"{np.mean([point['cpu'] for point in last]):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Differences, paired by seed:",
        "",
        f"| | {' | '.join(measures)} |",
        "|---" * (len(measures) + 1) + "|",
    ]
    baselines = [arm for arm in study.baselines if arm in curves]
    for place, other in enumerate(baselines):
        for arm in [arm for arm in curves if arm not in baselines[: place + 1]]:
            differences = [
                over_seeds([found[arm][name][seed] - found[other][name][seed] for seed in curves[arm]], "+")
                for name in measures
            ]
            lines.append(f"| {arm} − {other} | {' | '.join(differences)} |")
    return "\n".join(lines)


def at_tokens(points: list[dict[str, float]], tokens: float) -> float:
    return float(np.interp(tokens, [p["tokens"] for p in points], [p["pass@1"] for p in points]))


def plot(study: str, runs: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for arm, seeds in runs.items():
        curves = [run["points"] for run in seeds.values()]
        grid = np.linspace(0, min(points[-1]["tokens"] for points in curves), 200)
        ys = np.array([[at_tokens(points, tokens) for tokens in grid] for points in curves])
        mean, sd = ys.mean(axis=0), ys.std(axis=0, ddof=1) if len(ys) > 1 else 0
        panel.plot(grid, mean, color=COLOURS[arm], label=arm)
        panel.fill_between(grid, mean - sd, mean + sd, color=COLOURS[arm], alpha=0.12, linewidth=0)
    panel.set(title=STUDIES[study].title, xlabel="generated tokens", ylabel="pass@1 on held-out prompts")
    panel.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    count = len(next(iter(runs.values())))
    figure.suptitle(f"Sorting digits, set N: mean of {count} seeds, bands ± 1 sd")
    figure.savefig(path, dpi=130)


def one_run(name: str, arm: str, seed: int, start: Path, size: Size, output_dir: Path) -> dict[str, Any]:
    """Each finished run is kept: an interrupted benchmark goes on where it was."""
    torch.set_num_threads(1)
    disable_progress_bars()
    version = code_version("curriculum.py", "ppo_learning.py")
    done = output_dir / f"{name}_{arm}_{seed}_{start.name}_{size.batches}_{size.points}_{version}.json"
    if not done.exists():
        with tempfile.TemporaryDirectory() as directory:
            found = STUDIES[name].run(arm, start, seed, directory, size)
        part = done.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(done)
    result: dict[str, Any] = json.loads(done.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: both")
    parser.add_argument("--arms", nargs="+", choices=[*CURRICULA, *SCHEDULES], help="default: all of each study")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on one thread (default: 1)")
    parser.add_argument("--model", type=Path, help="folder of the start; default: made by the recipes, one per seed")
    parser.add_argument("--batches", type=int, default=60, help="generation batches of a run (default: 60)")
    parser.add_argument("--points", type=int, default=10, help="measurements of a run (default: 10)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmarks" / "curriculum")
    parser.add_argument("--report", action="store_true", help="write tables and picture into benchmarks/")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.report and args.arms:
        parser.error("--report writes whole tables: leave out --arms")
    arms = {name: [arm for arm in STUDIES[name].arms if not args.arms or arm in args.arms] for name in args.study}
    size, seeds = Size(args.batches, args.points), range(args.first_seed, args.first_seed + args.seeds)
    with workers(args.jobs) as do:
        starts = dict.fromkeys(range(len(seeds)), args.model)
        if args.model is None:
            starts |= dict(do(start_of_outcome, [(args.output_dir, seed) for seed in seeds]))
        calls = [
            (name, arm, seed, starts[place], size, args.output_dir)
            for name in args.study
            for place, seed in enumerate(seeds)
            for arm in arms[name]
        ]
        done = {}
        for place, result in do(one_run, calls):
            (name, arm, seed, *_), first, last = calls[place], result["points"][0], result["points"][-1]
            done[name, arm, seed] = result
            print(
                f"{len(done)}/{len(calls)} seed {seed} {arm}: {first['pass@1']:.3f} → {last['pass@1']:.3f}, "
                f"{last['steps']:.0f} steps, {last['tokens']:.0f} tokens, {last['cpu']:.0f} CPU-s",
                flush=True,
            )
    for name in args.study:
        runs = {arm: {seed: done[name, arm, seed] for seed in seeds} for arm in arms[name]}
        text = markdown(runs, STUDIES[name])
        print(text)
        if args.report:
            write_report("curriculum.py", name, text)
        plot(name, runs, (ROOT / "benchmarks" if args.report else args.output_dir) / f"curriculum_{name}.png")


if __name__ == "__main__":
    main()
