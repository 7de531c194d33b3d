"""
How well does PPO learn next to TRL's GRPO, from the same start, on the same number of generated completions, with the
same number of optimizer steps? Three studies:

- `outcome`: set N of the sorting task, and a reward of 1 for a right answer, at its end. PPO with a value head, and
  GRPO, each train LoRA adapters, and each all weights. Measured: pass@1.
- `steps`: the prompt `m4096=` asks for each digit's successor, `5107`, and demonstrations have half of their digits
  wrong. Every right digit is a reward. PPO gets them where they were earned; GRPO, which takes one number, their sum,
  and so does PPO for comparison. Measured: the share of digits that are right.
- `critics`: PPO of the study `outcome` with LoRA, and each kind of critic: a head on the policy's hidden states, which
  learns alone or shapes the policy's adapter, too; an adapter of its own on the policy's base; a model of its own.

A generation batch is 256 completions (GRPO: 32 prompts × 8; PPO: 256 prompts), used in 2 epochs of 2 mini-batches. The
learning rate is the same for both methods: 3e-4 for all weights, 1e-3 for adapters. Completions are sampled at
temperature 1, measured on 512 held-out prompts.

```shell
python benchmarks/ppo_learning.py --study outcome --seeds 5 --report
python benchmarks/ppo_learning.py --study steps --seeds 5 --start_seed 0 --report
python benchmarks/ppo_learning.py --study critics --seeds 5 --jobs 2 --report
```
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
import trl
from datasets import Dataset, DatasetDict
from learning_report import write_report
from learning_runs import Budget, Curve, TokenCounter, code_version, run_recipe, supervised, workers
from peft import LoraConfig
from task import ROOT, TrainingTask
from transformers import PrinterCallback

import trl_ext
from recipes.tasks.sort_digits import DIGITS, build_model, build_tokenizer, with_random_digits


mpl.use("Agg")

GRPO, PPO = (trl.GRPOTrainer, trl.GRPOConfig), (trl_ext.PPOTrainer, trl_ext.PPOConfig)
COMPLETIONS, EPOCHS, MINI_BATCHES = 256, 2, 2
# A critic that shapes the features of so small a model, and is free to follow rewards of any size
CRITIC = {
    "num_generations": 1,
    "kl_coef": 0.0,
    "critic_head": "mlp",
    "critic_trunk_grad": 1.0,
    "critic_learning_rate": 3e-3,
    "vf_coef": 1.0,
    "cliprange_value": None,
}
ALL_WEIGHTS, ADAPTER = {"learning_rate": 3e-4}, {"learning_rate": 1e-3}
# A critic that shapes no features of the policy's; its learning rate is the policy's
OF_ITS_OWN = {"critic_trunk_grad": None, "critic_learning_rate": 1e-3, "critic_lam": 0.5}
LENGTHS = range(10, 15)
TEST_PROMPTS, SAMPLES = 512, 2


class Method(NamedTuple):
    classes: tuple[Any, Any]
    settings: dict[str, Any]
    lora: bool = False
    by_step: bool = False  # the reward


class DigitCounter(TokenCounter):
    """
    The reward of the study `steps`, counting tokens.

    Args:
        by_step (`bool`):
            Whether a completion gets a list, one reward a token, or their sum.
    """

    __name__ = "right_digits"

    def __init__(self, by_step: bool) -> None:
        super().__init__()
        self.by_step = by_step

    def __call__(self, completion_ids: list[list[int]], answer_ids: list[list[int]], **kwargs: Any) -> list[Any]:
        self.tokens += sum(map(len, completion_ids))
        steps = [right_tokens(ids, answer) for ids, answer in zip(completion_ids, answer_ids, strict=True)]
        return steps if self.by_step else [sum(rewards) for rewards in steps]


class DigitCurve(Curve):
    """Samples the share of tokens that are right."""

    metric = "right digits"

    def score(self, ids: list[int], answer: list[int]) -> float:
        return sum(right_tokens(ids, answer))


def right_tokens(ids: list[int], answer: list[int]) -> list[float]:
    """For each token, its share in the answer if it is the right one for its place; they add up to 1 at most."""
    return [float(i < len(answer) and answer[i] == token) / len(answer) for i, token in enumerate(ids)]


def successors(digits: str) -> str:
    return "".join(DIGITS[(DIGITS.index(digit) + 1) % 10] for digit in digits)


class SuccessorTask(TrainingTask):
    """What [`TrainingTask`] is, for digits and their successors."""

    noise = 0.5  # share of the demonstrations' digits that are random

    def __post_init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.rng = random.Random(self.seed)
        test = self.rows(TEST_PROMPTS)
        self.known = set(test["prompt"])
        self.data = DatasetDict(train=self.other_rows(self.train_size), test=test)

    def demonstrations(self) -> Dataset:
        """For the supervised start."""
        shown = self.other_rows(40_000)
        completions = [with_random_digits(answer, self.noise, self.rng) for answer in shown["answer"]]
        return Dataset.from_dict({"prompt": shown["prompt"], "completion": completions})

    def other_rows(self, count: int) -> Dataset:
        """Rows that are not held out; fewer than were drawn."""
        return self.rows(count).filter(lambda row: row["prompt"] not in self.known)

    def rows(self, count: int) -> Dataset:
        drawn = ["".join(self.rng.choices(DIGITS, k=self.rng.choice(LENGTHS))) for _ in range(count)]
        answers = list(map(successors, drawn))
        ids = self.tokenizer([answer + self.tokenizer.eos_token for answer in answers])["input_ids"]
        return Dataset.from_dict({"prompt": [f"m{d}=" for d in drawn], "answer": answers, "answer_ids": ids})


def start_of_outcome(directory: Path, seed: int) -> Path:
    base = directory / f"task_N_{seed}"
    if not (base / "init").exists():
        run_recipe(
            "recipes/tasks/sort_digits.py", "--output_dir", base, "--task_set", "N", "--seed", seed, "--pairs_size", 0
        )
    return supervised(base / "init", base / "data", directory / f"sft_N_{seed}", seed)


def start_of_steps(directory: Path, seed: int) -> Path:
    base = directory / f"task_successors_{seed}"
    if not (base / "init").exists():
        task = SuccessorTask(seed=seed, train_size=1)
        DatasetDict(sft=task.demonstrations(), **task.data).save_to_disk(base / "data")
        build_model(task.tokenizer, seed).save_pretrained(base / "init")
        task.tokenizer.save_pretrained(base / "init")
    more = ("--max_steps", 1500, "--learning_rate", 3e-3)
    return supervised(base / "init", base / "data", directory / f"sft_successors_{seed}", seed, *more)


class Study(NamedTuple):
    start: Callable[[Path, int], Path]
    task: Callable[..., TrainingTask]
    curve: type[Curve]
    generations: int
    methods: dict[str, Method]


STUDIES = {
    "outcome": Study(
        start_of_outcome,
        TrainingTask,
        Curve,
        60,
        {
            "GRPO, LoRA": Method(GRPO, ADAPTER, lora=True),
            "PPO, LoRA": Method(PPO, {**ADAPTER, **CRITIC, "critic_lam": 0.5}, lora=True),
            "GRPO": Method(GRPO, ALL_WEIGHTS),
            "PPO": Method(PPO, {**ALL_WEIGHTS, **CRITIC, "critic_lam": 0.5}),
        },
    ),
    "steps": Study(
        start_of_steps,
        SuccessorTask,
        DigitCurve,
        20,
        {
            "GRPO, sum": Method(GRPO, ALL_WEIGHTS),
            "PPO, sum": Method(PPO, {**ALL_WEIGHTS, **CRITIC}),
            "PPO, steps": Method(PPO, {**ALL_WEIGHTS, **CRITIC, "gamma": 0.5, "lam": 0.5}, by_step=True),
        },
    ),
    "critics": Study(
        start_of_outcome,
        TrainingTask,
        Curve,
        60,
        {
            "GRPO": Method(GRPO, ADAPTER, lora=True),
            "head": Method(PPO, {**ADAPTER, **CRITIC, "critic_trunk_grad": 0.0, "critic_lam": 0.5}, lora=True),
            "head, trunk learns": Method(PPO, {**ADAPTER, **CRITIC, "critic_lam": 0.5}, lora=True),
            "adapter": Method(PPO, {**ADAPTER, **CRITIC, **OF_ITS_OWN, "critic": "adapter"}, lora=True),
            "model": Method(
                PPO, {**ADAPTER, **CRITIC, **OF_ITS_OWN, "critic": "model", "critic_head": None}, lora=True
            ),
        },
    ),
}
TITLES = {
    "outcome": "Sorting digits, set N",
    "steps": "Digits and their successors",
    "critics": "Sorting digits, set N, LoRA",
}
# Okabe and Ito's
COLOURS = {
    "GRPO": "#000000",
    "GRPO, LoRA": "#999999",
    "GRPO, sum": "#000000",
    "PPO": "#0072B2",
    "PPO, LoRA": "#56B4E9",
    "PPO, sum": "#56B4E9",
    "PPO, steps": "#D55E00",
    "head": "#56B4E9",
    "head, trunk learns": "#0072B2",
    "adapter": "#D55E00",
    "model": "#009E73",
}


def shape_of_runs(generations: int) -> dict[str, int]:
    """The settings that make a run of so many generation batches, each used in `EPOCHS` epochs of `MINI_BATCHES`."""
    return {
        "per_device_train_batch_size": COMPLETIONS // MINI_BATCHES,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": MINI_BATCHES,
        "num_iterations": EPOCHS,
        "max_steps": EPOCHS * MINI_BATCHES * generations,
    }


def train(study: Study, method: Method, start: Path, seed: int, points: int, generations: int) -> dict[str, Any]:
    """
    The curve of a run, explained variance by optimizer step where there is a critic, and the numbers of weights of
    policy and critic together, and of those that are trained.
    """
    trainer_class, config_class = method.classes
    counter = DigitCounter(method.by_step) if study.curve is DigitCurve else TokenCounter()
    task = study.task(seed=seed, model_path=str(start), reward_func=counter, train_size=8192)
    curve = study.curve(task, counter, Budget(generations, float("inf"), points), SAMPLES)
    with tempfile.TemporaryDirectory() as directory:
        settings = task.settings(
            directory,
            logging_strategy="steps",
            logging_steps=EPOCHS * MINI_BATCHES,
            **shape_of_runs(generations),
            **method.settings,
        )
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
        more = {"peft_config": adapter} if method.lora else {}
        trainer = trainer_class(args=config_class(**settings), callbacks=[curve], **task.arguments(), **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # There is none while all returns are equal
    logged = [entry for entry in trainer.state.log_history if entry.get("val/explained_variance") is not None]
    return {
        "points": curve.points,
        "explained_variance": {entry["step"]: entry["val/explained_variance"] for entry in logged},
        "weights": sum(weight.numel() for weight in trainer.model.parameters()),
        "trained": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
    }


def explained_at_the_end(run: dict[str, Any]) -> float | None:
    """Mean over the last sixth of the run."""
    values = list(run["explained_variance"].values())
    return float(np.mean(values[-max(1, len(values) // 6) :])) if values else None


def table(runs: dict[str, dict[int, dict[str, Any]]], metric: str) -> list[dict[str, Any]]:
    """A row a method: mean and sd over seeds of the last measurement, and of its difference to the first method's."""
    rows: list[dict[str, Any]] = []
    finals = {method: {s: run["points"][-1][metric] for s, run in seeds.items()} for method, seeds in runs.items()}
    first = next(iter(finals.values()))
    for method, seeds in runs.items():
        last, spread = list(finals[method].values()), len(seeds) > 1
        differences = [finals[method][s] - first[s] for s in seeds]
        explained = [e for e in map(explained_at_the_end, seeds.values()) if e is not None]
        rows.append(
            {
                "method": method,
                "seeds": len(seeds),
                "start": float(np.mean([run["points"][0][metric] for run in seeds.values()])),
                "final": float(np.mean(last)),
                "sd": float(np.std(last, ddof=1)) if spread else float("nan"),
                "by_seed": last,
                "difference": float(np.mean(differences)),
                "difference_sd": float(np.std(differences, ddof=1)) if spread else float("nan"),
                "explained_variance": explained,
                "tokens": float(np.mean([run["points"][-1]["tokens"] for run in seeds.values()])),
                "cpu": float(np.mean([run["points"][-1]["cpu"] for run in seeds.values()])),
                **{name: next(iter(seeds.values()))[name] for name in ("weights", "trained")},
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], metric: str) -> str:
    lines = [
        f"| method | {metric}: start | end (mean ± sd) | by seed | against {rows[0]['method']}, paired (mean ± sd) "
        "| explained variance at the end (mean, least) | weights (k) | trained (k) | tokens (k) | CPU-s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        explained = row["explained_variance"]
        cells = [
            row["method"],
            f"{row['start']:.3f}",
            f"{row['final']:.3f} ± {row['sd']:.3f}",
            ", ".join(f"{value:.3f}" for value in row["by_seed"]),
            "" if row is rows[0] else f"{row['difference']:+.3f} ± {row['difference_sd']:.3f}",
            f"{np.mean(explained):.2f}, {min(explained):.2f}" if explained else "",
            *(f"{row[name] / 1000:.0f}" for name in ("weights", "trained", "tokens")),
            f"{row['cpu']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: dict[str, dict[int, dict[str, Any]]], metric: str, title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (learned, explained) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method, seeds in runs.items():
        tokens = np.mean([[p["tokens"] for p in run["points"]] for run in seeds.values()], axis=0)
        values = np.array([[p[metric] for p in run["points"]] for run in seeds.values()])
        mean, sd = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
        learned.plot(tokens, mean, color=COLOURS[method], label=method)
        learned.fill_between(tokens, mean - sd, mean + sd, color=COLOURS[method], alpha=0.15, linewidth=0)
        logged = [run["explained_variance"] for run in seeds.values() if run["explained_variance"]]
        if logged:
            steps = list(map(int, logged[0]))
            explained.plot(steps, np.mean([list(e.values()) for e in logged], axis=0), color=COLOURS[method])
    learned.set(xlabel="generated tokens", ylabel=f"{metric}, held-out prompts")
    learned.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    learned.legend(frameon=False)
    explained.set(xlabel="optimizer steps", ylabel="explained variance of returns")
    for panel in (learned, explained):
        panel.grid(alpha=0.3)
    figure.suptitle(f"{title}: mean of {len(next(iter(runs.values())))} seeds, bands ± 1 sd")
    figure.savefig(path, dpi=130)


def one_run(
    study: str, method: str, start: Path, seed: int, points: int, generations: int, output_dir: Path
) -> dict[str, Any]:
    """Each finished run is kept: an interrupted benchmark goes on where it was."""
    torch.set_num_threads(1)
    settings = f"{start.name}_{generations}_{points}_{code_version('ppo_learning.py')}"
    done = output_dir / f"{study}_{method}_{seed}_{settings}.json"
    if not done.exists():
        chosen = STUDIES[study]
        part = done.with_suffix(".part")
        part.write_text(json.dumps(train(chosen, chosen.methods[method], start, seed, points, generations)))
        part.rename(done)
    result: dict[str, Any] = json.loads(done.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="outcome")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on one thread (default: 1)")
    parser.add_argument("--start_seed", type=int, help="one start for all seeds (default: each has its own)")
    parser.add_argument("--model", type=Path, help="folder of the start; default: made by the recipes, one per seed")
    parser.add_argument("--generations", type=int, help="generation batches of a run (default: 60; steps: 20)")
    parser.add_argument("--points", type=int, default=6, help="measurements of a run (default: 6)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmarks" / "ppo_learning")
    parser.add_argument("--report", action="store_true", help="write the table into benchmarks/RESULTS.md")
    parser.add_argument("--json", action="store_true", help="print the table as JSON in the last line")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    study = STUDIES[args.study]
    metric = study.curve.metric
    generations = args.generations or study.generations

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in study.methods}
    with workers(args.jobs) as do:
        own = seeds if args.start_seed is None else [args.start_seed]
        starts = dict.fromkeys(own, args.model)
        if args.model is None:
            made = do(study.start, [(args.output_dir, seed) for seed in own])
            starts |= {own[place]: path for place, path in made}
        calls = [
            (args.study, name, starts[seed if args.start_seed is None else args.start_seed], seed, args.points)
            for seed in seeds
            for name in study.methods
        ]
        for place, run in do(one_run, [(*call, generations, args.output_dir) for call in calls]):
            _, name, _, seed, _ = calls[place]
            runs[name][seed] = run
            first, last, explained = run["points"][0], run["points"][-1], explained_at_the_end(run)
            print(
                f"seed {seed} {name}: {first[metric]:.3f} → {last[metric]:.3f}, {last['tokens']:.0f} tokens, "
                f"{last['cpu']:.0f} CPU-s" + ("" if explained is None else f", explained variance {explained:.2f}"),
                flush=True,
            )
    runs = {name: {seed: by_seed[seed] for seed in seeds} for name, by_seed in runs.items()}

    rows = table(runs, metric)
    text = markdown(rows, metric)
    print(text)
    picture = f"ppo_{args.study}.png"
    title = TITLES[args.study]
    plot(runs, metric, title, args.output_dir / picture)
    if args.report:
        plot(runs, metric, title, ROOT / "benchmarks" / picture)
        write_report("ppo_learning.py", args.study, text)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
