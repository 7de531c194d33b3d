"""Folders of runs as recipes leave them, written by hand: what a report reads, without a training."""

import json
import math
from pathlib import Path
from typing import Any

from trl_ext.evaluation.held_out_texts import HELD_OUT_TEXTS, PromptTexts, write_texts
from trl_ext.reports.run_files import write_settings


NASTY = "<script>alert(1)</script> & \"quotes\" 'single' <img src=x onerror=alert(2)>\x00"


def log(steps: int, level: float = 0.0, kl: float = 1.0) -> list[dict[str, Any]]:
    """A held-out measurement at both ends and a log a step, with a reward that rises by 0.1."""
    entries = [_held_out(0, 0.3 + level)]
    for step in range(1, steps + 1):
        entries.append(
            {
                "step": step,
                "reward": level + 0.1 * step,
                "rewards/exact/mean": level + 0.1 * step,
                "objective/kl": 1.0 + (kl - 1.0) * step / steps,
                "entropy": 1.5 - 0.02 * step,
                "clip_ratio/region_mean": 0.01 * step,
                "completions/mean_length": 10.0 + 0.1 * step,
                "frac_reward_zero_std": 0.5,
                "loss": math.sin(step),
            }
        )
    return [*entries, _held_out(steps, 0.6 + level)]


def _held_out(step: int, mean: float) -> dict[str, Any]:
    parts = {"": mean, "/low": mean - 0.05, "/high": mean + 0.05, "/prompts": 64, "/samples": 256}
    return {"step": step, **{f"held_out/exact{part}": value for part, value in parts.items()}}


def summary(steps: int, level: float = 0.0) -> dict[str, Any]:
    def part(mean: float, reach: float) -> dict[str, Any]:
        ends = {"exact": [round(mean - reach, 4), round(mean + reach, 4)]}
        return {"exact": round(mean, 4), "intervals": ends, "prompts": 64, "samples": 256, "step": steps}

    return {
        "method": "DAPO",
        "model": "org/model",
        "dataset": "org/data",
        "before": part(0.3 + level, 0.05),
        "after": part(0.6 + level, 0.05),
        "gain": part(0.3, 0.06),
        "seconds": 12.5,
        "steps": steps,
        "generated_tokens": 12_000,
        "trained_tokens": 9_000,
        "seed": 0,
        "command": "accelerate launch recipes/dapo.py",
        "machine": {"device": "cpu", "processes": 1, "cpus": 2, "platform": "Linux"},
        "versions": {"python": "3.11.7"},
    }


def state(folder: Path, history: list[dict[str, Any]], max_steps: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    steps = history[-1]["step"]
    content = {"log_history": history, "global_step": steps, "max_steps": max_steps or steps}
    (folder / "trainer_state.json").write_text(json.dumps(content), encoding="utf-8")


def texts(prompts: int, rights: int, nasty: bool = False) -> list[PromptTexts]:
    """Two completions for each prompt, of which the first `rights` prompts have right ones."""
    word = NASTY if nasty else "word"
    return [
        PromptTexts(f"prompt {i} {word}", [f"a{i} {word}", f"b{i}"], {"exact": [float(i < rights), float(i < rights)]})
        for i in range(prompts)
    ]


def finished(folder: Path, level: float = 0.0, kl: float = 1.0, nasty: bool = False, **settings: Any) -> Path:
    """A run of 20 steps that solves prompts 0 to 4 before and, in a different order of luck, 2 to 9 after."""
    state(folder, log(20, level, kl))
    (folder / "summary.json").write_text(json.dumps(summary(20, level)), encoding="utf-8")
    write_settings(folder, {"learning_rate": 1e-4, "seed": 0, "output_dir": str(folder), **settings}, list(settings))
    before, after = texts(12, 5, nasty), texts(12, 10, nasty)
    after[:2] = [PromptTexts(one.prompt, one.completions, {"exact": [0.0, 0.0]}) for one in after[:2]]
    write_texts(folder / HELD_OUT_TEXTS, 0, before)
    write_texts(folder / HELD_OUT_TEXTS, 20, after)
    return folder


def of_stages(folder: Path) -> Path:
    """DPO of 10 steps, then PPO of 20."""
    state(
        folder / "round_1/dpo", [{"step": i, "rewards/accuracies": 0.5 + 0.04 * i, "loss": 0.5} for i in range(1, 11)]
    )
    state(folder / "round_1/ppo", log(20))
    entries = [
        {"name": "start", "round": 0, "folder": "start"},
        {"name": "pairs", "round": 1, "folder": "round_1/pairs"},
        {"name": "dpo", "round": 1, "folder": "round_1/dpo"},
        {"name": "ppo", "round": 1, "folder": "round_1/ppo"},
    ]
    (folder / "stages.json").write_text(json.dumps({"settings": {}, "stages": entries}), encoding="utf-8")
    measured = {"exact": 0.3, "intervals": {"exact": [0.25, 0.35]}, "prompts": 64, "samples": 256}
    costs = {"low": 0.25, "high": 0.35, "generated_tokens": 500, "seconds": 3.0}
    steps = {"start": 0, "dpo": 10, "ppo": 20}
    stages = [{"name": name, "steps": taken, **measured, **costs} for name, taken in steps.items()]
    content = {"method": "DPO, then PPO", "metric": "exact", "stages": stages, "seconds": 9.0, "steps": 30}
    (folder / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    write_texts(folder / "start" / HELD_OUT_TEXTS, 0, texts(6, 1))
    write_texts(folder / "round_1/ppo" / HELD_OUT_TEXTS, 0, texts(6, 2))
    write_texts(folder / "round_1/ppo" / HELD_OUT_TEXTS, 20, texts(6, 5))
    return folder
