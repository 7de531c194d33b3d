"""
Which method learns faster, and by what measure? From a supervised start, one per seed, every method of a study gets
the same batches of 32 prompts × 8 completions (or what its name says), 4 optimizer steps on each, the same learning
rate and schedule. Two tasks: `sort`, set A of the sorting task (the start was shown 3 to 8 digits, and is trained on
4 to 14), and `automaton`, words whose difficulty is not to be seen (`automaton.py`).

- `methods`: GRPO (TRL's own trainer), DAPO, DUPO and GSPO, each with its own defaults, over the same number of
  generation batches.
- `refill`: TRL's GRPO against the same loss with refilled batches, from blind and from informed draws, over the same
  number of generated tokens: 2,000 prompts, passed several times.
- `prediction`: the same question where nothing is said about the prompts, which are seen once (20,000 prompts) or
  several times (500).
- `objectives`: GRPO, MaxRL, DPPO, Dr. GRPO, DAPO and PPO, on prompts that are seen once.
- `vapo`: VAPO, VAPO without each of its seven parts, and without all of them, which is PPO. All have a critic with its
  own weights. The tokens of the pretraining count like all others. α is 1 in place of the paper's 0.05, with which λ
  would be 0 for all completions, which are this short.

The last three measure pass@1 and pass@8, and *tokens to target*: how many tokens a run generates until it is as good
as the first method (TRL's GRPO, or VAPO) of the same seed is at its end. For that, they get a quarter more tokens than
that. pass@k is sampled at temperature 1 on held-out prompts; tokens and CPU-seconds count everything but evaluation.

```shell
python benchmarks/learning.py --seeds 5 --report
python benchmarks/learning.py --study refill --seeds 10 --report
python benchmarks/learning.py --study prediction --seeds 8 --jobs 2 --report
python benchmarks/learning.py --study objectives --seeds 8 --jobs 2 --report
python benchmarks/learning.py --study vapo --seeds 5 --jobs 2 --report
```
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl
from automaton import AutomatonTask
from datasets import disable_progress_bars
from learning_report import Curves, markdown, plot, plot_targets, table, target_markdown, target_table, write_report
from learning_runs import Budget, Curve, TokenCounter, Work, code_version, warm_up, warm_up_automaton, workers
from ppo_learning import CRITIC
from task import ROOT, TrainingTask
from transformers import PrinterCallback

import trl_ext


TRL = (trl.GRPOTrainer, trl.GRPOConfig)
OURS = (trl_ext.GRPOTrainer, trl_ext.GRPOConfig)
INFORMED = {"rollout_selection": "refill", "refill_draws": "informed"}
BY_LENGTH = {**INFORMED, "similar_prompts_columns": ["digits"]}
HALF_BATCH = {"per_device_train_batch_size": 32}
PPO = {**CRITIC, "num_iterations": 1, "critic_lam": 0.5}
VAPO = {
    "num_generations": 16,
    "critic_learning_rate": 1e-3,
    "critic_warmup_steps": 12,
    "lam_alpha": 1.0,
    "warmup_steps": 0,
}
# What VAPO is without each of its parts
WITHOUT: dict[str, dict[str, Any]] = {
    "pretraining": {"critic_warmup_steps": 0},
    "decoupled GAE": {"critic_lam": None},
    "length-adaptive GAE": {"lam_alpha": None},
    "clip-higher": {"epsilon_high": None},
    "token-level loss": {"loss_type": "grpo"},
    "NLL": {"positive_nll_coef": 0.0},
    "groups": {"num_generations": 1},
}
WITHOUT_ALL = {name: value for settings in WITHOUT.values() for name, value in settings.items()}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "GRPO": (*TRL, {}),
    "DAPO": (trl_ext.DAPOTrainer, trl_ext.DAPOConfig, {"soft_punish_cache": 0, "warmup_steps": 0}),
    "DUPO": (trl_ext.DUPOTrainer, trl_ext.DUPOConfig, {}),
    "GSPO": (trl_ext.GSPOTrainer, trl_ext.GSPOConfig, {}),
    "blind": (*OURS, {"rollout_selection": "refill"}),
    "informed": (*OURS, INFORMED),
    "informed+length": (*OURS, BY_LENGTH),
    # What is missing after one more round is filled with copies
    "informed+length, 1 round": (*OURS, {**BY_LENGTH, "max_refill_rounds": 1}),
    "GRPO, 16 prompts": (*TRL, HALF_BATCH),
    "informed, 16 prompts": (*OURS, {**INFORMED, **HALF_BATCH}),
    "no features, 16 prompts": (*OURS, {**INFORMED, **HALF_BATCH, "prompt_features": "none"}),
    "signal, 16 prompts": (*OURS, {**INFORMED, **HALF_BATCH, "refill_value": "signal"}),
    # Of the budget of 16 prompts, one gets 8 or 16 completions
    "sizes, 16 prompts": (*OURS, {**INFORMED, **HALF_BATCH, "max_num_generations": 16}),
    "informed+length, 16 prompts": (*OURS, {**BY_LENGTH, **HALF_BATCH}),
    "MaxRL": (*OURS, {"advantage_estimator": "maxrl"}),
    "DPPO, TV": (*OURS, {"trust_region": "binary_tv"}),
    "DPPO, KL": (*OURS, {"trust_region": "binary_kl"}),
    "Dr. GRPO": (*TRL, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "PPO": (trl_ext.PPOTrainer, trl_ext.PPOConfig, PPO),
    "VAPO": (trl_ext.VAPOTrainer, trl_ext.VAPOConfig, VAPO),
    **{
        f"no {name}": (trl_ext.VAPOTrainer, trl_ext.VAPOConfig, {**VAPO, **settings})
        for name, settings in WITHOUT.items()
    },
    "none of them: PPO": (trl_ext.VAPOTrainer, trl_ext.VAPOConfig, {**VAPO, **WITHOUT_ALL}),
}


class Task(NamedTuple):
    """A task, and the budget of generated tokens and the learning rate that suit it: GRPO's best in pilots."""

    title: str
    start: Callable[[Path, int, int | None], Path]
    build: Callable[..., TrainingTask]
    tokens: float
    learning_rate: float


TASKS = {
    "sort": Task("sorting digits, set A", warm_up, partial(TrainingTask, "A"), 150_000, 1e-4),
    "automaton": Task("walking an automaton", warm_up_automaton, AutomatonTask, 100_000, 2e-4),
}


class Study(NamedTuple):
    """
    What a study compares.

    Args:
        methods (`list[str]`):
            Entries of `METHODS`.
        prompts (`list[int]`):
            Training prompts. The study is made with each of these numbers.
        picture (`str`):
            File in this folder.
        tasks (`list[str]`):
            Entries of `TASKS`. The study is made on each of them.
        generations, tokens (*optional*):
            Of a run, at most.
        learning_rate (`float`, *optional*):
            By default, what suits the task.
        points, samples, test_prompts (`int`):
            Measurements of a run, completions for each held-out prompt, and their number.
        targets (`bool`):
            Whether tokens to target are measured, with the tokens that suit the task.
        baseline (`str`):
            The method whose level is the target.
    """

    methods: list[str]
    prompts: list[int]
    picture: str
    tasks: list[str]
    generations: int = 100_000
    tokens: float = float("inf")
    learning_rate: float | None = None
    points: int = 20
    samples: int = 2
    test_prompts: int = 512
    targets: bool = False
    baseline: str = "GRPO"


TARGETS: dict[str, Any] = {"tasks": list(TASKS), "points": 12, "samples": 8, "test_prompts": 128, "targets": True}
STUDIES = {
    "methods": Study(
        ["GRPO", "DAPO", "DUPO", "GSPO"], [2048], "learning.png", ["sort"], generations=40, learning_rate=1e-4
    ),
    "refill": Study(
        [
            "GRPO",
            "blind",
            "informed+length",
            "informed+length, 1 round",
            "GRPO, 16 prompts",
            "informed+length, 16 prompts",
        ],
        [2000],
        "refill.png",
        ["sort"],
        tokens=400_000,
        learning_rate=1e-4,
    ),
    "prediction": Study(
        [
            "GRPO",
            "GRPO, 16 prompts",
            "blind",
            "informed",
            "informed, 16 prompts",
            "no features, 16 prompts",
            "signal, 16 prompts",
            "sizes, 16 prompts",
        ],
        [20_000, 500],
        "prediction.png",
        **TARGETS,
    ),
    "objectives": Study(
        ["GRPO", "MaxRL", "DPPO, TV", "DPPO, KL", "Dr. GRPO", "DAPO", "PPO"], [20_000], "objectives.png", **TARGETS
    ),
    "vapo": Study(
        ["VAPO", *(f"no {name}" for name in WITHOUT), "none of them: PPO"],
        [20_000],
        "vapo.png",
        **TARGETS | {"points": 6},
        tokens=60_000,
        baseline="VAPO",
    ),
}
MORE = 1.25  # of the baseline's tokens, for the others to reach its level


class Run(NamedTuple):
    """One run of a study. Equal runs of equal code are made once."""

    method: str
    task: str
    seed: int
    start: Path
    budget: Budget
    samples: int
    prompts: int
    test_prompts: int
    learning_rate: float

    def file(self, directory: Path) -> Path:
        about = repr((METHODS[self.method], self._replace(start=Path(self.start.name)), code_version()))
        return (
            directory / f"{self.task}_{self.method}_{self.seed}_{hashlib.sha256(about.encode()).hexdigest()[:12]}.json"
        )


def train(run: Run) -> list[dict[str, float]]:
    trainer_class, config_class, settings = METHODS[run.method]
    counter = TokenCounter()
    task = TASKS[run.task].build(
        seed=run.seed,
        model_path=str(run.start),
        reward_func=counter,
        train_size=run.prompts,
        test_size=run.test_prompts,
    )
    curve = Curve(task, counter, run.budget, run.samples)
    with tempfile.TemporaryDirectory() as output_dir:
        settings = task.settings(
            output_dir,
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            max_steps=4 * run.budget.generations,
            learning_rate=run.learning_rate,
            logging_strategy="steps",
            logging_steps=4,
            **settings,
        )
        trainer = trainer_class(args=config_class(**settings), callbacks=[curve], **task.arguments())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curve.points


def work(run: Run, directory: Path) -> tuple[list[dict[str, float]], bool]:
    """The curve of a run, and whether it is new. Each is kept: an interrupted benchmark goes on where it was."""
    done = run.file(directory)
    is_new = not done.exists()
    if is_new:
        torch.set_num_threads(1)
        disable_progress_bars()
        part = done.with_suffix(".part")
        part.write_text(json.dumps(train(run)))
        part.rename(done)
    return json.loads(done.read_text()), is_new


def start(directory: Path, task: str, seed: int, steps: int | None) -> Path:
    return TASKS[task].start(directory, seed, steps)


def plan(study: Study, args: argparse.Namespace, starts: dict[tuple[str, int], Path]) -> list[Run]:
    """All runs of a study, those of a seed together."""
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in study.tasks:
            tokens = TASKS[name].tokens if study.targets and study.tokens == float("inf") else study.tokens
            for prompts in study.prompts:
                for method in study.methods:
                    more = MORE if study.targets and method != study.baseline else 1
                    runs.append(
                        Run(
                            method,
                            name,
                            seed,
                            starts[name, seed],
                            Budget(study.generations, more * tokens, round(more * study.points)),
                            study.samples,
                            prompts,
                            study.test_prompts,
                            study.learning_rate or TASKS[name].learning_rate,
                        )
                    )
    return runs


def reported(do: Work, runs: list[Run], directory: Path) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """The place and the curve of each run, printed with the time that is left."""
    began, missing = time.monotonic(), sum(not run.file(directory).exists() for run in runs)
    new = 0
    for done, (place, (points, is_new)) in enumerate(do(work, [(run, directory) for run in runs])):
        new += is_new
        left = f", {(time.monotonic() - began) / new * (missing - new) / 60:.0f} minutes left" if new else ""
        run, first, last = runs[place], points[0], points[-1]
        print(
            f"{done + 1}/{len(runs)} {run.task} {run.prompts} seed {run.seed} {run.method}: {first['pass@1']:.3f} → "
            f"{last['pass@1']:.3f}, {last['tokens']:.0f} tokens, {last['cpu']:.0f} CPU-s{left}",
            flush=True,
        )
        yield place, points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="methods")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on one thread (default: 1)")
    parser.add_argument("--sft_steps", type=int, help="steps of the supervised warm-up (default: the recipe's)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmarks" / "learning")
    parser.add_argument("--report", action="store_true", help="write tables and picture into benchmarks/")
    parser.add_argument("--json", action="store_true", help="print the last table as JSON in the last line")
    of_study = parser.add_argument_group("in place of what a study says (see STUDIES)")
    of_study.add_argument("--methods", nargs="+", choices=METHODS)
    of_study.add_argument("--task", nargs="+", choices=TASKS, dest="tasks")
    of_study.add_argument("--prompts", nargs="+", type=int, help="training prompts")
    of_study.add_argument("--generations", type=int, help="generation batches of a run, at most")
    of_study.add_argument("--tokens", type=float, help="generated tokens of a run")
    of_study.add_argument("--learning_rate", type=float)
    of_study.add_argument("--points", type=int, help="measurements of a run")
    of_study.add_argument("--samples", type=int, help="completions for each held-out prompt")
    of_study.add_argument("--test_prompts", type=int, help="held-out prompts")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if name in Study._fields and value is not None}
    study = STUDIES[args.study]._replace(**given)
    if study.targets and study.baseline not in study.methods:
        parser.error(f"--methods needs {study.baseline}, whose level the others are to reach")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    with workers(args.jobs) as do:
        sets = [(name, seed) for name in study.tasks for seed in range(args.first_seed, args.first_seed + args.seeds)]
        made = do(start, [(args.output_dir, *each, args.sft_steps) for each in sets])
        runs = plan(study, args, {sets[place]: path for place, path in made})
        curves = {runs[place]: points for place, points in reported(do, runs, args.output_dir)}

    found: dict[str, Curves] = {}
    for name in study.tasks:
        for prompts in study.prompts:
            chosen = [run for run in runs if (run.task, run.prompts) == (name, prompts)]
            part = {m: {run.seed: curves[run] for run in chosen if run.method == m} for m in study.methods}
            rows = target_table(part, study.baseline) if study.targets else table(part)
            text = target_markdown(rows, study.baseline) if study.targets else markdown(rows)
            title = f"{TASKS[name].title}, {prompts:,} prompts"
            found[title] = part
            print(f"\n{title}\n\n{text}")
            if args.report:
                more = f" --task {name} --prompts {prompts}" if study.targets else ""
                write_report("learning.py", args.study + more, text)
    picture = (ROOT / "benchmarks" if args.report else args.output_dir) / study.picture
    if study.targets:
        plot_targets(found, study.baseline, picture)
    else:
        plot(next(iter(found.values())), picture)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
