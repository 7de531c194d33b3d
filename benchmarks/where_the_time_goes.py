"""
Where does the time of a training step go, over the length of the prompt? TRL's trainer, ours that fits micro-batches,
and ours that shares prompts too, on the same rollouts (`train_phase.py --workload prefix`). Draws `prefixes.png`.

```shell
python benchmarks/where_the_time_goes.py --json
```
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from train_phase import SIZES, seconds_in_turn, train


SIDES = {"trl": "TRL", "unshared": "fitted micro-batches", "trl_ext": "and shared prompts"}
COLOURS = ("#9aa5b1", "#5b8fb9", "#1f5f8b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512, 1024])
    parser.add_argument("--dead", type=float, default=0.3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("prefixes.png"))
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"workload": "prefix", "loss_type": "dapo", "steps": 1, "longest": SIZES[args.device]["longest"]}
    seconds: dict[int, dict[str, float]] = {}
    for prompt in args.prompts:
        given = argparse.Namespace(**settings, dead=args.dead, device=args.device, prompt=prompt)
        taken = seconds_in_turn(list(SIDES), args.runs, partial(train, args=given, detailed=False))
        seconds[prompt] = {side: statistics.median(values) for side, values in taken.items()}
        print(prompt, {side: round(value, 2) for side, value in seconds[prompt].items()}, flush=True)

    draw(seconds, args.dead, args.picture)
    if args.json:
        print(json.dumps(seconds))


def draw(seconds: dict[int, dict[str, float]], dead: float, picture: Path) -> None:
    """Seconds of a step by tokens of a prompt and side."""
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for i, (side, name) in enumerate(SIDES.items()):
        share = [of_sides[side] / of_sides["trl"] for of_sides in seconds.values()]
        bars = axes.bar([x + (i - 1) * 0.27 for x in range(len(share))], share, 0.25, label=name, color=COLOURS[i])
        axes.bar_label(bars, [f"{s:.2f}" for s in share], fontsize=8, padding=2)
    axes.set_xticks(range(len(seconds)), [f"{prompt:,}" for prompt in seconds])
    axes.set_xlabel("tokens of a prompt, which 16 completions of about 45 tokens share")
    axes.set_ylabel("time of a training step, TRL = 1")
    axes.set_title(f"Forward and backward passes, {dead:.0%} of the groups without reward variance", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=len(SIDES))
    axes.set_ylim(0, 1.3)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main()
