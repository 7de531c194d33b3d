"""
Informed draws: the choice of prompts by the prediction that was right most often lately. A curriculum takes its pass
rates from the same prediction.

Several [`~trl_ext.rollouts.outlook.PromptOutlook`]s forget at different speeds, and each predicts in two ways: by
similar prompts, and by what the policy's own hidden states say of a prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from datasets import Dataset

from ..metric_keys import CALIBRATION_ERROR, PREDICTION_TOKENS, SELECTION
from .calibration import Calibration
from .choosers import PromptChooser
from .generation_batch import GenerationBatch
from .outlook import PromptOutlook, Value, live_probability, pass_rate
from .pass_rates import Floats
from .prompt_features import PromptFeatures, Reader


# Half-lives of 3, 14 and 69 generation batches. How fast a policy changes depends on learning rate, updates and task.
MEMORIES = (0.8, 0.95, 0.99)
# Factor on the log-likelihood of earlier predictions at each tick, so that about the last ten batches decide
TRUST_MEMORY = 0.9
# What is predicted of a group: whether it is live, or the share of its completions that pass
PREDICTED: dict[str, Value] = {"live": live_probability, "pass_rate": pass_rate}


class AdaptiveOutlook(PromptChooser):
    """
    Several [`PromptOutlook`]s that forget at different speeds, each of which predicts by similar prompts and, if
    prompts can be read, by their features. The prediction that was best in the recent past decides, measured by its
    log-likelihood (prequential model selection). If the policy changes fast, old evidence is wrong; if it changes
    slowly, forgetting wastes evidence. If features say nothing, similar prompts decide.

    Args:
        columns, num_generations, success_threshold, seed, exploration, most_slots:
            See [`PromptOutlook`].
        value (`str`, *optional*, defaults to `"live"`):
            What is chosen for, an entry of [`~trl_ext.rollouts.outlook.VALUES`].
        predicted (`str`, *optional*, defaults to `"live"`):
            By what predictions are judged, an entry of `PREDICTED`.
    """

    key = "outlook"
    lookahead = 8

    def __init__(
        self,
        columns: list[str],
        num_generations: int,
        success_threshold: float,
        seed: int,
        exploration: float = 0.25,
        most_slots: int = 1,
        value: str = "live",
        predicted: str = "live",
    ) -> None:
        self.outlooks = [
            PromptOutlook(columns, num_generations, success_threshold, seed, memory, exploration, most_slots)
            for memory in MEMORIES
        ]
        self.seed, self.value, self.predicted = seed, value, predicted
        self.features: PromptFeatures | None = None
        self.calibration = Calibration()
        # Of every outlook by features, then of every outlook by similar prompts
        self._log_likelihoods = [0.0] * (2 * len(MEMORIES))

    @classmethod
    def for_run(cls, dataset: Any, config: Any) -> Self:
        """The outlook for a run with a trainer's data set and [`~trl_ext.GRPOConfig`]."""
        columns, size = config.similar_prompts_columns or [], config.num_generations
        own = cls(
            columns,
            size,
            config.success_threshold,
            config.seed,
            exploration=config.refill_exploration,
            most_slots=(config.max_num_generations or size) // size,
            value=config.refill_value,
        )
        if isinstance(dataset, Dataset):
            own.set_bins({column: dataset[column][:] for column in columns})  # in one read, not row by row
        return own

    def read_prompts(self, read: Reader) -> None:
        """Predict from features of the prompts, too."""
        self.features = PromptFeatures(read, self.seed)

    @property
    def _best(self) -> int:
        """The prediction that was best; of equally good ones, by similar prompts and with the longest memory."""
        return max(reversed(range(len(self._log_likelihoods))), key=lambda i: self._log_likelihoods[i])

    @property
    def best(self) -> PromptOutlook:
        """The outlook that predicted best; of equally good ones, the one that remembers longest."""
        return self.outlooks[self._best % len(MEMORIES)]

    @property
    def trusts_features(self) -> bool:
        """Whether the best prediction is made by features."""
        return self._best < len(MEMORIES)

    def set_bins(self, values_by_column: Mapping[str, Sequence[Any]]) -> None:
        """See [`PromptOutlook.set_bins`]."""
        for outlook in self.outlooks:
            outlook.set_bins(values_by_column)

    def begin(self, trainer: Any) -> None:
        """Evidence fades with each generation batch."""
        self.tick()

    def end(self, trainer: Any, batch: GenerationBatch) -> None:
        """Logs how many prompts that the loader dealt were replaced, and what predicting is worth and costs."""
        trainer.train_metrics[f"{SELECTION}prompts_replaced"].append(batch.replaced)
        self.log(trainer.train_metrics)

    def log(self, metrics: Any) -> None:
        """Logs what predicting is worth and costs, in a trainer's metrics of training."""
        metrics[CALIBRATION_ERROR].append(self.calibration.error)
        if self.features is not None:
            metrics[f"{SELECTION}trusts_features"].append(float(self.trusts_features))
            metrics[PREDICTION_TOKENS] = [self.features.tokens]

    def closing_metrics(self) -> dict[str, float]:
        """How reliable predictions were lately."""
        return self.calibration.metrics()

    def tick(self) -> None:
        """See [`PromptOutlook.tick`]."""
        self._log_likelihoods = [TRUST_MEMORY * value for value in self._log_likelihoods]
        for outlook in self.outlooks:
            outlook.tick()
        self.calibration.tick()
        if self.features is not None:
            self.features.tick()

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: list[bool]) -> None:
        """See [`PromptOutlook.observe`]. Each prediction is scored before the outlook learns from the groups."""
        features, best = self._read(rows), self._best
        # Groups are filled up with NaN to the size of the largest one
        rewarded = (~outcomes.isnan()).sum(dim=1).tolist()
        slots = [max(1, math.ceil(n / self.outlooks[0].num_generations)) for n in rewarded]
        came_true = self._came_true(outcomes, live)
        predictions = self._predictions(rows, features, slots)
        for i, predicted in enumerate(predictions):
            for probability, share in zip(predicted, came_true, strict=True):
                for part, likelihood in ((share, probability), (1 - share, 1 - probability)):
                    # Bounded, so that no single group decides
                    self._log_likelihoods[i] += part * math.log(max(likelihood, 0.01))
        self.calibration.observe(predictions[best], came_true)
        for outlook in self.outlooks:
            outlook.observe(rows, outcomes, live, features)

    def _came_true(self, outcomes: torch.Tensor, live: list[bool]) -> list[float]:
        """For each group, 1 if what was predicted is so and 0 if not; for pass rates, the share that passed."""
        if self.predicted == "live":
            return [float(is_live) for is_live in live]
        passed = (outcomes >= self.outlooks[0].success_threshold).sum(dim=1)
        shares: list[float] = (passed / (~outcomes.isnan()).sum(dim=1).clamp(min=1)).tolist()
        return shares

    def _read(self, rows: Sequence[dict[str, Any]]) -> Floats | None:
        if self.features is None:
            return None
        found = self.features.of(rows)
        for outlook in self.outlooks:
            outlook.plain = self.features.projection.plain
        return found

    def _predictions(
        self, rows: Sequence[dict[str, Any]], features: Floats | None, slots: list[int]
    ) -> list[list[float]]:
        of = PREDICTED[self.predicted]
        similar = [outlook.values(rows, of=of, slots=slots) for outlook in self.outlooks]
        if features is None:
            return similar + similar
        return [outlook.values(rows, features, of, slots) for outlook in self.outlooks] + similar

    def live_probability(self, row: dict[str, Any]) -> float:
        """Probability that the group of a prompt would be live if it were generated now, calibrated."""
        features = self._read([row]) if self.trusts_features else None
        return self.calibration(self.best.values([row], features)[0])

    def pass_rates(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """
        For each prompt, the probability that a completion passes if it were generated now. Must be called on every
        rank with the same rows.
        """
        features = self._read(rows)
        return self.best.values(rows, features if self.trusts_features else None, pass_rate)

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        """See [`PromptOutlook.choose`]."""
        features = self._read(rows)
        return self.best.choose(rows, count, dealt, features if self.trusts_features else None, self.value)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned. It doesn't change when the outlook is called again."""
        return {
            "outlooks": [outlook.state_dict() for outlook in self.outlooks],
            "log_likelihoods": list(self._log_likelihoods),
            "calibration": self.calibration.state_dict(),
            "features": None if self.features is None else self.features.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""
        for outlook, saved in zip(self.outlooks, state["outlooks"], strict=True):
            outlook.load_state_dict(saved)
        self._log_likelihoods = list(state["log_likelihoods"])
        self.calibration.load_state_dict(state["calibration"])
        if self.features is not None and state["features"] is not None:
            self.features.load_state_dict(state["features"])


# Values of `prompt_features`
PROMPT_FEATURES = ("hidden_states", "none")

# By `refill_draws`: a function from a trainer's data set and configuration to the chooser of its prompts. A new way to
# choose them is a chooser and an entry here.
REFILL_DRAWS: dict[str, Callable[[Any, Any], PromptChooser]] = {
    "blind": lambda dataset, config: PromptChooser(),
    "informed": AdaptiveOutlook.for_run,
}
