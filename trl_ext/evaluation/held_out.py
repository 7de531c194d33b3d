"""
How good a policy is on prompts it was not trained on, and how certain that is.

Several completions are sampled for each prompt. The completions of one prompt are not independent, because an easy
prompt is solved every time. The unit of evidence is therefore the prompt and not the sample: the estimate of a metric
is the mean over prompts of the mean over each prompt's samples, and its interval is Student's t interval of the prompt
means. Treating 256 × 4 samples as 1,024 independent ones would give intervals that are up to a factor of two too
narrow.

Before and after training, the same prompts are sampled with the same seeds. [`difference`] pairs them, which removes
the difficulty of the prompts from the difference.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

import torch
from scipy import stats
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import require, require_count, require_type, shown
from ..rollouts.rollout import Rollout
from .divergence import KL, kl_of_completions
from .held_out_texts import MOST_PROMPTS, PromptTexts, texts_of, write_texts


LOG_PREFIX = "held_out/"


class ScoredSamples(Protocol):
    """The part of what `roll_out` returns that evaluation reads."""

    rewards: torch.Tensor  # (P, G, F), NaN where a reward function doesn't apply
    reward_func_names: list[str]
    rollouts: list[Rollout]  # of this process


class RollsOut(Protocol):
    """A trainer that can sample and score prompts without training on them, as all trainers of `trl_ext` can."""

    def roll_out(self, rows: list[dict[str, Any]], num_generations: int, seed: int | None = None) -> ScoredSamples: ...


@dataclass(frozen=True)
class Estimate:
    """
    A metric on held-out prompts, with its 95 % interval.

    Args:
        mean (`float`):
            Mean over prompts of the mean over samples.
        low (`float`):
            Lower end of the interval.
        high (`float`):
            Upper end of the interval.
        prompts (`int`):
            Number of prompts to which the metric applied.
        samples (`int`):
            Number of samples to which it applied.
        per_prompt (`tuple[float, ...]`, *optional*):
            Mean of each prompt, in the order of the data set, NaN where the metric didn't apply. Empty if only the
            other numbers are known, as for an estimate that was read from a log.
    """

    mean: float
    low: float
    high: float
    prompts: int
    samples: int
    per_prompt: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, values: torch.Tensor, is_rate: bool | None = None) -> "Estimate":
        """
        Estimates the mean of a metric. If all values are 0 or 1, the metric is taken for a rate, and its interval is
        cut to [0, 1]. If all samples of a rate agree, their variance is small rather than zero, and the interval is
        Clopper and Pearson's exact one with one trial per prompt.

        Args:
            values (`torch.Tensor` of shape `(P, G)`):
                The metric for G samples of each of P prompts, NaN where it doesn't apply.
            is_rate (`bool`, *optional*):
                Whether it is one. `None`: if all values are 0 or 1.

        Raises:
            ValueError: if fewer than 2 prompts have a value, because there is no interval then.
        """
        require_type("values", values, torch.Tensor, "Pass a tensor with a row for each prompt.")
        require(values.dim() == 2, f"values has the shape {tuple(values.shape)}. Pass one of shape (P, G).")
        applies = ~values.isnan()
        per_prompt = values.double().nanmean(dim=1).tolist()
        means = [mean for mean in per_prompt if not math.isnan(mean)]
        if len(means) < 2:
            raise ValueError(
                f"An interval needs values for at least 2 prompts, got {len(means)} of {len(per_prompt)}. Evaluate on "
                "more prompts, or leave the metric out."
            )
        mean = fmean(means)
        low, high = _t_interval(means)
        if is_rate is None:
            is_rate = bool(((values == 0) | (values == 1) | ~applies).all())
        if is_rate:
            if mean in (0.0, 1.0):  # all samples agree
                reach = 1 - 0.025 ** (1 / len(means))
                low, high = max(0.0, mean - reach), min(1.0, mean + reach)
            low, high = max(0.0, low), min(1.0, high)
        return cls(mean, low, high, len(means), int(applies.sum()), tuple(per_prompt))


def difference(before: Estimate, after: Estimate) -> Estimate:
    """
    `after - before` with its 95 % interval. If both estimates have `per_prompt`, the prompts are paired. Otherwise the
    two intervals are added in quadrature, which is too wide if the prompts were the same, and never too narrow.

    Raises:
        ValueError: if both have `per_prompt`, for different numbers of prompts.
    """
    if before.per_prompt and after.per_prompt:
        pairs = zip(before.per_prompt, after.per_prompt, strict=True)
        changes = [y - x for x, y in pairs if not math.isnan(x) and not math.isnan(y)]
        low, high = _t_interval(changes)
        return Estimate(fmean(changes), low, high, len(changes), min(before.samples, after.samples), tuple(changes))
    change = after.mean - before.mean
    reach_down = math.hypot(after.mean - after.low, before.high - before.mean)
    reach_up = math.hypot(after.high - after.mean, before.mean - before.low)
    return Estimate(
        change,
        change - reach_down,
        change + reach_up,
        min(before.prompts, after.prompts),
        min(before.samples, after.samples),
    )


def evaluate_policy(
    trainer: RollsOut,
    dataset: Iterable[dict[str, Any]],
    num_samples: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    texts: list[PromptTexts] | None = None,
    kl: bool = False,
) -> dict[str, Estimate]:
    """
    Samples completions for held-out prompts and estimates the mean of each reward function. It has its own seeds, so
    that a call changes nothing about the training run, and two calls with the same policy sample the same completions.

    Args:
        trainer ([`GRPOTrainer`]):
            Any `trl_ext` trainer. Every process must make the call.
        dataset ([`~datasets.Dataset`] or other iterable of rows):
            Held-out rows, with the columns the rewards need.
        num_samples (`int`, *optional*, defaults to `4`):
            Samples per prompt (G), at the trainer's own temperature.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts per call of `roll_out`. It decides how much memory is used. Because every batch has its own seed,
            it also decides which samples are drawn: keep it the same for results that are compared.
        seed (`int`, *optional*, defaults to `0`):
            Seed of batch 0; batch i has the seed `seed + 1000 * i`.
        texts (`list[PromptTexts]`, *optional*):
            A list to which the completions of the first [`~trl_ext.evaluation.held_out_texts.MOST_PROMPTS`] prompts
            are appended, on every process.
        kl (`bool`, *optional*, defaults to `False`):
            Whether to measure the divergence from the reference, too: as `"kl"`, in nats per completion, on one of G
            completions ([`~trl_ext.evaluation.divergence`]). Left out where there is no reference.

    Returns:
        `dict[str, Estimate]`: one estimate per reward function, by its name. Functions that applied to fewer than two
        prompts are left out.

    Raises:
        ValueError: if `num_samples` or `batch_size` isn't positive, or if the data set has fewer than 2 rows.
    """
    _check(trainer, dataset, num_samples=num_samples, batch_size=batch_size)
    rewards: list[torch.Tensor] = []
    moved: list[torch.Tensor] = []
    names: list[str] = []
    for index, rows in enumerate(_batches(dataset, batch_size)):
        # A thousand apart, because `roll_out` adds the index of the process to the seed
        scored = trainer.roll_out(rows, num_samples, seed=seed + 1000 * index)
        rewards.append(scored.rewards.detach().cpu())
        names = list(scored.reward_func_names)
        if kl:
            moved.append(_divergence(trainer, scored.rollouts, num_samples)[: len(rows)])
        if texts is not None and len(texts) < MOST_PROMPTS:
            texts += texts_of(scored, MOST_PROMPTS - len(texts))
    prompts = sum(len(batch) for batch in rewards)
    require(prompts >= 2, f"dataset has {prompts} rows, but held-out evaluation needs at least 2. Pass more.")
    values = torch.cat(rewards)  # (P, G, F)
    found = {name: Estimate.of(values[:, :, i]) for i, name in enumerate(names) if _applies(values[:, :, i])}
    if kl and _applies(divergence := torch.cat(moved)):
        # A policy that hasn't moved has a divergence of 0, for sure
        found[KL] = Estimate.of(divergence, is_rate=False)
    return found


def _applies(values: torch.Tensor) -> bool:
    """Whether a metric `(P, G)` applied to as many prompts as an interval needs."""
    return int((~values.isnan()).any(dim=1).sum()) >= 2


def _divergence(trainer: Any, rollouts: Sequence[Rollout], num_samples: int) -> torch.Tensor:
    """`(P, G)`, NaN but for one in G completions: with equally many on every process, a pass each waits for no one."""
    found = torch.full((len(rollouts),), float("nan"))
    found[::num_samples] = kl_of_completions(trainer, rollouts[::num_samples]).float()
    gathered: torch.Tensor = trainer.accelerator.gather(found.to(trainer.accelerator.device))
    return gathered.cpu().view(-1, num_samples)


def _check(trainer: Any, dataset: Any, **counts: int) -> None:
    if not hasattr(trainer, "roll_out"):
        raise TypeError(f"trainer is {shown(trainer)}. Pass one of trl_ext's, such as trl_ext.GRPOTrainer.")
    require_type("dataset", dataset, Iterable, "Pass a datasets.Dataset of held-out prompts.")
    for name, value in counts.items():
        require_count(name, value)


class HeldOut(TrainerCallback):
    """
    Measures a policy before training, after training, and every `every` steps in between.

    The results go to the trackers and into `state.log_history`, under `held_out/<metric>`. Every checkpoint contains
    that history, so that a resumed run knows how good the policy was at step 0 and doesn't measure it again.

    Args:
        trainer ([`GRPOTrainer`]):
            The trainer to which the callback is added.
        dataset ([`~datasets.Dataset`] or other sized iterable of rows):
            Held-out rows.
        num_samples (`int`, *optional*, defaults to `4`):
            Samples per prompt.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts per call of `roll_out`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling, the same for every measurement.
        every (`int`, *optional*, defaults to `0`):
            Optimizer steps between measurements. With 0, the policy is measured only before and after training.
        sampler ([`GRPOTrainer`], *optional*):
            A trainer of the same weights that samples, where `trainer` (of DPO) can't. `None`: `trainer`.
        texts (`str` or `Path`, *optional*):
            File to which the completions of the first prompts are written at every measurement
            ([`~trl_ext.evaluation.held_out_texts.write_texts`]). `None`: no texts are kept.
        kl (`bool`, *optional*, defaults to `False`):
            Whether to measure the divergence from the reference, too.

    Attributes:
        measured (`dict[int, dict[str, Estimate]]`):
            Estimates by optimizer step and metric, in the order of steps.
    """

    def __init__(
        self,
        trainer: Any,
        dataset: Iterable[dict[str, Any]],
        num_samples: int = 4,
        batch_size: int = 64,
        seed: int = 0,
        every: int = 0,
        sampler: RollsOut | None = None,
        texts: str | Path | None = None,
        kl: bool = False,
    ):
        _check(sampler or trainer, dataset, num_samples=num_samples, batch_size=batch_size)
        require_count("every", every, least=0)
        self.trainer = trainer
        self.sampler: RollsOut = sampler or trainer
        self.dataset = dataset
        self.settings: dict[str, Any] = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "seed": seed,
            "kl": kl,
        }
        self.every = every
        self.texts = texts
        self.measured: dict[int, dict[str, Estimate]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Before trackers, which close what they write to at the end of training, when the policy is measured once more
        callbacks = self.trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)
        # Here and not before `train()`, because DeepSpeed and FSDP place the model on its devices in `train()`
        self.measured = read_estimates(state.log_history)
        if not self.measured:
            self.measure(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The last step is left to `on_train_end`, which sees the model that will be saved
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.measure(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step not in self.measured or args.load_best_model_at_end:
            self.measure(state)

    def measure(self, state: TrainerState) -> None:
        """Measures the policy as it is now, and logs the result. Every process must make the call."""
        texts: list[PromptTexts] | None = None if self.texts is None else []
        estimates = evaluate_policy(self.sampler, self.dataset, **self.settings, texts=texts)
        if self.texts is not None and state.is_world_process_zero:
            write_texts(self.texts, state.global_step, texts or [])
        self.measured[state.global_step] = estimates
        logs: dict[str, float] = {}
        for name, estimate in estimates.items():
            logs[f"{LOG_PREFIX}{name}"] = estimate.mean
            for part in ("low", "high", "prompts", "samples"):
                logs[f"{LOG_PREFIX}{name}/{part}"] = getattr(estimate, part)
        # Not by `trainer.log`, which would also flush the training metrics that are being collected for this step. And
        # not with the trainer's own control, in which `on_log` notes that this step has been logged.
        state.log_history.append({**logs, "step": state.global_step, "epoch": state.epoch})
        self.trainer.callback_handler.on_log(self.trainer.args, state, TrainerControl(), dict(logs))

    @property
    def before(self) -> dict[str, Estimate]:
        """The first measurement."""
        return next(iter(self.measured.values()))

    @property
    def after(self) -> dict[str, Estimate]:
        """The latest measurement."""
        return next(reversed(self.measured.values()))


def read_estimates(log_history: Sequence[dict[str, Any]]) -> dict[int, dict[str, Estimate]]:
    """Reads what [`HeldOut`] logged: estimates by optimizer step and metric, without `per_prompt`."""
    measured: dict[int, dict[str, Estimate]] = {}
    for entry in log_history:
        metrics = [key.removesuffix("/low") for key in entry if key.startswith(LOG_PREFIX) and key.endswith("/low")]
        if metrics:
            measured[entry["step"]] = {
                key.removeprefix(LOG_PREFIX): Estimate(
                    entry[key],
                    entry[f"{key}/low"],
                    entry[f"{key}/high"],
                    int(entry[f"{key}/prompts"]),
                    int(entry[f"{key}/samples"]),
                )
                for key in metrics
            }
    return measured


def _batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values."""
    if len(values) < 2:
        return -math.inf, math.inf
    reach = float(stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)))
    return fmean(values) - reach, fmean(values) + reach
