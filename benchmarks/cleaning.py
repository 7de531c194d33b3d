"""
How much of what wrong labels cost does cleaning bring back, when nothing but the pairs is known?

Pairs of the sorting task (the answer to a list of 2 to 5 digits, and a wrong one), of which 20 % are turned around on
purpose. DPO, by TRL's own trainer, is trained on three versions of them, from the same start and with the same
settings:

- `clean`: as they were;
- `noisy`: with the wrong labels;
- `cleaned`: the noisy ones after `clean_by_cross_fitting` in 4 folds and 2 rounds, whose scorers are the implicit
  rewards of policies that DPO trained on the noisy pairs of the other folds.
- `robust` (only with `--arms`): the noisy ones, with robust DPO at the noise rate that cross-fitting estimated.

What is measured is the accuracy of the implicit reward on held-out pairs with right labels: it is what wrong labels
harm here. (How often the policy sorts right isn't: DPO on clean pairs can push it down further than on noisy ones.)
The share of the loss that is recovered is (cleaned − noisy) / (clean − noisy).

```shell
python benchmarks/cleaning.py --seeds 5 --json
```

The start is the quickstart's supervised model, made once; seeds draw the pairs, the wrong labels and the order of
training. Settings were chosen on seed 100, but that there are two rounds on seed 0. Each finished training is kept:
an interrupted benchmark goes on where it was.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from scipy import stats
from task import ROOT

from recipes.tasks import sort_digits
from trl_ext.preferences import cleaning, noise, pairs, scorers
from trl_ext.preferences.cleaning import Scorer, clean_by_cross_fitting, flip_pairs, pair_margins
from trl_ext.preferences.scorers import ImplicitRewardTraining
from trl_ext.rewards import implicit


ARMS = ("clean", "noisy", "cleaned", "robust")
LONGEST = 5  # digits of a prompt: on longer ones a model this small learns little from this few pairs
DPO = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "per_device_train_batch_size": 32,
    "num_train_epochs": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "beta": 0.1,
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 128,
}


@dataclass
class Size:
    """Pairs, share of wrong labels, folds, rounds; of the test prompts the short ones give the held-out pairs."""

    pairs: int
    noise: float
    folds: int
    rounds: int
    test_prompts: int


def warm_up(directory: Path) -> Path:
    """The supervised start, by the recipes; made once."""
    target = directory / "sft"
    if (target / "config.json").exists():
        return target
    base, environment = directory / "task", {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        ["recipes/tasks/sort_digits.py", "--output_dir", base, "--pairs_size", 0],
        [
            "recipes/sft.py",
            *("--config", "recipes/configs/quickstart_sft.yaml", "--model_name_or_path", base / "init"),
            *("--dataset_name", base / "data", "--output_dir", target),
        ],
    ):
        subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True
        )
    return target


def build(seed: int, size: Size) -> tuple[Dataset, Dataset, list[int], Dataset]:
    """Clean pairs, noisy pairs, which of them are wrong, and held-out pairs."""
    # Half of the prompts are short; more are drawn than needed
    data = sort_digits.build_data(
        "N", sort_digits.build_tokenizer(), seed, 64, 64, size.test_prompts, 3 * size.pairs
    ).filter(lambda row: "chosen" not in row or len(row["chosen"]) <= LONGEST)
    right = data["pairs"].select(range(size.pairs))
    wrong = sorted(random.Random(seed).sample(range(size.pairs), round(size.noise * size.pairs)))
    return right, flip_pairs(right, wrong), wrong, data["pairs_test"]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What is in the file, or is made and written into it."""
    if not path.exists():
        made = make()
        path.with_suffix(".part").write_text(json.dumps(made))
        path.with_suffix(".part").rename(path)
    return json.loads(path.read_text())


class KeptFit:
    """A fit whose scores are kept, fold by fold; the scorer is trained when it is first asked for others."""

    def __init__(self, fit: Callable[[Dataset], Scorer], path: Path) -> None:
        self.fit, self.path, self.fold = fit, path, 0

    def __call__(self, pairs: Dataset) -> Scorer:
        self.fold += 1
        path = self.path.with_name(f"{self.path.name}_fold{self.fold}.json")
        return lambda prompts, completions: kept(
            path, lambda: list(self.fit(pairs)(prompts=prompts, completions=completions))
        )


def run(seed: int, start: str, size: Size, arms: list[str], folder: Path) -> dict[str, Any]:
    right, noisy, wrong, test = build(seed, size)
    name = f"{seed}_{size.pairs}_{size.noise}_{size.folds}_{size.rounds}_{size.test_prompts}_{code_version(start)}"
    fit = ImplicitRewardTraining(start, {**DPO, "seed": seed}, batch_size=256)
    reports = []
    for rounds in sorted({1, size.rounds}):  # the first round's scorers are the same, and kept
        cleaned, report = clean_by_cross_fitting(
            noisy, KeptFit(fit, folder / name), size.folds, seed=seed, rounds=rounds
        )
        reports.append(report)
    left = [len(set(report.rows(cleaning.FLIPPED)) ^ set(wrong)) / size.pairs for report in reports]
    assert report.noise is not None and reports[0].noise is not None
    robust = ImplicitRewardTraining(start, {**fit.args, **report.noise.dpo_settings()}, batch_size=256)
    trained = {"clean": (fit, right), "noisy": (fit, noisy), "cleaned": (fit, cleaned), "robust": (robust, noisy)}

    def accuracy(arm: str) -> float:
        method, on = trained[arm]
        return float(np.mean(np.array(pair_margins(test, method(on))) > 0))

    found: dict[str, Any] = {
        "seed": seed,
        "noise": asdict(report.noise),
        "wrong_left": left[-1],
        "noise_in_one_round": asdict(reports[0].noise),
        "wrong_left_by_one_round": left[0],
        "wrong_left_expected": report.noise_left,
        "held_out_pairs": len(test),
    }
    for arm in arms:
        found[arm] = kept(folder / f"{name}_{arm}.json", partial(accuracy, arm))
        print(f"seed {seed} {arm}: {found[arm]:.4f}", flush=True)
    found["recovered"] = (found["cleaned"] - found["noisy"]) / (found["clean"] - found["noisy"])
    return found


def code_version(start: str) -> str:
    """Digest of what a run depends on, so that results of other code are not taken for results of this."""
    sources = [Path(module.__file__ or "") for module in (cleaning, noise, pairs, scorers, implicit, sort_digits)]
    weights = sorted(Path(start).glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in [Path(__file__), *sources, *weights])).hexdigest()[
        :12
    ]


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half)


def markdown(rows: list[dict[str, Any]], arms: list[str]) -> str:
    lines = [
        f"| seed | estimated noise (95 % interval) | wrong labels left (expected) | {' | '.join(arms)} | recovered |",
        "|---|---|---|" + "---|" * (len(arms) + 1),
    ]
    for row in rows:
        rate = "{rate:.1%} ({low:.1%} to {high:.1%})".format(**row["noise"])
        expected = row["wrong_left_expected"]  # of too few pairs it can't be told
        left = f"{row['wrong_left']:.1%} ({'–' if expected is None else format(expected, '.1%')})"
        accuracies = " | ".join(f"{row[arm]:.3f}" for arm in arms)
        lines.append(f"| {row['seed']} | {rate} | {left} | {accuracies} | {row['recovered']:.0%} |")

    def over_seeds(values: list[float], form: str) -> str:
        return " ± ".join(format(value, form) for value in mean_interval(values))

    means = " | ".join(over_seeds([row[arm] for row in rows], ".3f") for arm in arms)
    gained, lost = (float(np.mean([row[arm] - row["noisy"] for row in rows])) for arm in ("cleaned", "clean"))
    lines.append(
        f"| mean | {over_seeds([row['noise']['rate'] for row in rows], '.1%')} | "
        f"{over_seeds([row['wrong_left'] for row in rows], '.1%')} | {means} | "
        f"{over_seeds([row['recovered'] for row in rows], '.0%')} ({gained / lost:.0%} of the mean loss) |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=3200, help="pairs to train on (default: 3200)")
    parser.add_argument("--noise", type=float, default=0.2, help="share of labels turned around (default: 0.2)")
    parser.add_argument("--folds", type=int, default=4, help="folds of cross-fitting (default: 4)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of cross-fitting (default: 2)")
    parser.add_argument("--test_prompts", type=int, default=4096, help="held-out prompts, before the short are taken")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["clean", "noisy", "cleaned"])
    parser.add_argument("--model", help="folder of the start; default: made by the quickstart's recipes")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmarks" / "cleaning")
    parser.add_argument("--json", action="store_true", help="print all results as JSON in the last line")
    args = parser.parse_args()
    if not {"clean", "noisy", "cleaned"} <= set(args.arms):
        parser.error("--arms needs clean, noisy and cleaned: what is recovered is measured between them")
    torch.set_num_threads(1)
    disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start = args.model or str(warm_up(args.output_dir))
    size = Size(args.pairs, args.noise, args.folds, args.rounds, args.test_prompts)
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        rows.append(run(seed, start, size, args.arms, args.output_dir))
        print(
            "seed {seed}: estimated noise {rate:.1%}, recovered {recovered:.0%}".format(
                seed=seed, rate=rows[-1]["noise"]["rate"], recovered=rows[-1]["recovered"]
            ),
            flush=True,
        )
    print(markdown(rows, args.arms))
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
