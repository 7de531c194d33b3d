"""
A run in one small file, `summary.json`: what was trained, how good it was before and after, and what that cost.
Everything in it is read from the run.
"""

import json
import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState

from ..evaluation.held_out import Estimate, difference
from ..metric_keys import CALIBRATION_ERROR, EXPLAINED_VARIANCE, KL_PER_COMPLETION, PREDICTION_TOKENS, VALUE_LOSS
from ..pipelines.stages import StageResult
from ..redaction import redact


# What a critic's trainer logs
CRITIC_METRICS = {
    "value_loss": VALUE_LOSS,
    "explained_variance": EXPLAINED_VARIANCE,
    "kl": KL_PER_COMPLETION,
}
SUMMARY = "summary.json"
PACKAGES = ("trl_ext", "trl", "transformers", "torch", "accelerate", "peft", "datasets")


def summarize(
    trainer: Any,
    measured: dict[int, dict[str, Estimate]],
    seconds: float,
    model: str | None = None,
    dataset: str | None = None,
    command: str | None = None,
    reward_model: str | None = None,
) -> dict[str, Any]:
    """
    Builds the summary of a finished run.

    Args:
        trainer ([`GRPOTrainer`]):
            The trainer that ran. Those of `trl_ext` count tokens; for others these entries are `None`.
        measured (`dict[int, dict[str, Estimate]]`):
            Held-out estimates by optimizer step and metric, as [`HeldOut`] has them: of the policy before training
            first, after training last. May be empty.
        seconds (`float`):
            Wall-clock seconds of the whole run; of a resumed run, since it was resumed.
        model (`str`, *optional*):
            Hub id or folder of the model that was trained.
        dataset (`str`, *optional*):
            Hub id or folder of the data set.
        command (`str`, *optional*):
            The command line. Access tokens in it are replaced by `***`.
        reward_model (`str`, *optional*):
            Hub id or folder of the reward model that the policy was trained with. If the folder has a summary, as
            `recipes/reward.py` writes it, the summary's held-out results are copied: those after its training, and,
            under `before`, those before it.

    Returns:
        `dict[str, Any]`: `before`, `after` and `gain` map each metric to its mean, and hold under `intervals` the
        metric's `[low, high]` (95 %), under `prompts` and `samples` what it was measured on, and under `step` the
        optimizer step. `critic` holds, where there is one, the means of the last tenth of the log: `value_loss`,
        `explained_variance`, and `kl`, to the reference in nats per completion. `prediction` holds, where prompts were
        chosen by a prediction, its `calibration_error` at the end and the prompt `tokens` that it read.
        `compute_saved` is the share of the token slots of TRL's micro-batches that were not computed, `None` where
        none could be. Tokens, rounds and steps count the whole run, over all processes.
    """
    counters, saved = getattr(trainer, "counters", None), getattr(trainer, "saved_compute", None)
    processes = trainer.accelerator.num_processes
    summary: dict[str, Any] = {
        "method": type(trainer).__name__.removesuffix("Trainer"),
        "model": model,
        "dataset": dataset,
        "reward_model": None if reward_model is None else _reward_model(reward_model),
        "before": None,
        "after": None,
        "gain": None,
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "generation_rounds": getattr(counters, "generation_rounds", None),
        "generated_tokens": getattr(counters, "generated_tokens", None),
        "trained_tokens": getattr(counters, "trained_tokens", None),
        "compute_saved": round(saved.share, 4) if saved is not None and saved.rows else None,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "critic": _critic(trainer.state.log_history),
        "prediction": _prediction(trainer.state.log_history),
        "seed": trainer.args.seed,
        "command": None if command is None else redact(command),
        **_made_on(trainer.accelerator.device.type, processes),
    }
    if measured:
        (first, before), (last, after) = next(iter(measured.items())), next(reversed(measured.items()))
        gain = {name: difference(before[name], after[name]) for name in after if name in before}
        summary |= {"before": _entry(before, first), "after": _entry(after, last), "gain": _entry(gain, last)}
    return summary


def summarize_stages(
    stages: Sequence[StageResult],
    method: str,
    model: str | None = None,
    dataset: str | None = None,
    command: str | None = None,
    start_name: str = "start",
) -> dict[str, Any]:
    """
    Builds the summary of a run of several stages.

    Args:
        stages (`Sequence[StageResult]`):
            The finished stages in order: `DPOThenPPO.stages`.
        method (`str`):
            Name of the whole schedule.
        model, dataset, command (*optional*):
            As in [`summarize`].
        start_name (`str`, *optional*, defaults to `"start"`):
            Name of the policy before any stage.

    Returns:
        `dict[str, Any]`: `metric`, the first one that all stages have, and `stages`, with an entry for each that was
        measured: `name` (with the round, from the second on), `reward`, `low` and `high`: the mean of `metric` and its
        95 % interval; the mean of each metric by its name, `kl` to the reference among them (not under ZeRO-3);
        `intervals` of all, `prompts`, `samples`, `steps`, `generated_tokens` (those sampled for pairs count
        for DPO) and `seconds`.
    """
    entries: list[dict[str, Any]] = []
    sampled, took = 0, 0.0  # for pairs, which belong to the stage that learns from them
    metric = metric_of(stages)
    for stage in stages:
        sampled, took = sampled + stage.generated_tokens, took + stage.seconds
        if metric not in stage.measured:
            continue
        first = stage.measured[metric]
        results = _entry(stage.measured, stage.steps)
        results["steps"] = results.pop("step")
        name = start_name if stage.round == 0 else stage.name
        entries.append(
            {
                "name": name if stage.round < 2 else f"{name} {stage.round}",
                "reward": round(first.mean, 4),
                "low": round(first.low, 4),
                "high": round(first.high, 4),
                **results,
                "generated_tokens": sampled,
                "seconds": round(took, 1),
            }
        )
        sampled, took = 0, 0.0
    state: Any = PartialState()
    return {
        "method": method,
        "model": model,
        "dataset": dataset,
        "metric": metric,
        "stages": entries,
        "steps": sum(stage.steps for stage in stages),
        "generated_tokens": sum(stage.generated_tokens for stage in stages),
        "seconds": round(sum(stage.seconds for stage in stages), 1),
        "command": None if command is None else redact(command),
        **_made_on(state.device.type, state.num_processes),
    }


def metric_of(stages: Sequence[StageResult]) -> str | None:
    """The first metric that every measured stage has. The start has no learned reward."""
    measured = [stage.measured for stage in stages if stage.measured]
    names = measured[-1] if measured else ()
    return next((name for name in names if all(name in found for found in measured)), None)


def machine_in_words(machine: dict[str, Any]) -> str:
    """The devices of a summary, such as `4 × NVIDIA A100-SXM4-80GB` or `1 × cpu (2 cores, Linux)`."""
    devices = f"{machine['processes']} × {machine.get('name') or machine['device']}"
    return f"{devices} ({machine['cpus']} cores, {machine['platform']})" if machine["device"] == "cpu" else devices


def _made_on(device: str, processes: int) -> dict[str, Any]:
    machine = {"device": device, "processes": processes, "cpus": os.cpu_count(), "platform": platform.system()}
    if device == "cuda":
        machine["name"] = torch.cuda.get_device_name()
    return {"machine": machine, "versions": {"python": platform.python_version(), **_versions()}}


def write_summary(summary: dict[str, Any], path: str | Path) -> None:
    """Writes a summary as indented JSON."""
    Path(path).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def held_out_cell(part: dict[str, Any], metric: str) -> str:
    """A metric of a part of a summary, such as `after`, with its interval; a dash if it wasn't measured there."""
    if metric not in part:
        return "–"
    low, high = part["intervals"][metric]
    return f"{part[metric]:.3f} ({low:.3f} to {high:.3f})"


def intervals_in_words(part: dict[str, Any]) -> dict[str, str]:
    """The intervals of a part of a summary by metric, as the metadata of a card have them."""
    on = f"{part.get('prompts')} prompts"
    return {name: f"95 %: {low:.3f} to {high:.3f}, {on}" for name, (low, high) in part.get("intervals", {}).items()}


def _entry(estimates: dict[str, Estimate], step: int) -> dict[str, Any]:
    means = {name: round(estimate.mean, 4) for name, estimate in estimates.items()}
    return means | {
        "intervals": {name: [round(e.low, 4), round(e.high, 4)] for name, e in estimates.items()},
        "prompts": max((e.prompts for e in estimates.values()), default=0),
        "samples": max((e.samples for e in estimates.values()), default=0),
        "step": step,
    }


def _reward_model(name: str) -> dict[str, Any]:
    own = Path(name) / SUMMARY
    results = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    if not results.get("after"):
        return {"model": name}
    return {"model": name, **results["after"], "before": results["before"]}


def _critic(log_history: list[dict[str, Any]]) -> dict[str, float] | None:
    found = {}
    for name, key in CRITIC_METRICS.items():
        # `None` where it was NaN: explained variance is, while all returns are equal
        logged = [entry[key] for entry in log_history if entry.get(key) is not None and math.isfinite(entry[key])]
        if logged:
            found[name] = round(fmean(logged[-math.ceil(len(logged) / 10) :]), 4)
    return found or None


def _prediction(log_history: list[dict[str, Any]]) -> dict[str, float] | None:
    errors = [entry[CALIBRATION_ERROR] for entry in log_history if CALIBRATION_ERROR in entry]
    tokens = [entry[PREDICTION_TOKENS] for entry in log_history if PREDICTION_TOKENS in entry]
    if not errors:
        return None
    return {"calibration_error": round(errors[-1], 4), "tokens": round(max(tokens, default=0))}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # trl_ext itself, when it is used from a checkout without being installed
            continue
    return found
