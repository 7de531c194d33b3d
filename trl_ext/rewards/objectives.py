"""
Several objectives at once, beside what TRL has (fixed weights, and normalising before the sum): weights that follow a
schedule, and constraints: keep the mean of one reward above a floor while another is raised.

A constraint turns `max E[A] subject to E[B] ≥ floor` into its Lagrangian `E[A] + λ·(E[B] − floor)`: B gets the weight
λ, the policy climbs, and λ goes the other way, once a generation batch (dual descent; for language models
https://huggingface.co/papers/2310.12773):

    λ ← max(0, λ + learning_rate · (floor − mean B))

Weights are set when a generation batch begins and stay until the next one does: selection, advantages and credit by
token all see the same, and they are what is logged for it. A batch moves λ for the batches after it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import require
from ..rollouts.choosers import RolloutObserver
from ..rollouts.generation_batch import GenerationBatch


SHAPES = ("linear", "cosine", "steps")


@dataclass(frozen=True)
class ObjectiveSchedule:
    """
    The weight of a reward as a function of how much of the run is done.

    Args:
        points (`Sequence[tuple[float, float]]`):
            Pairs of share of the run, in [0, 1] and ascending, and weight from there on. Before the first and after
            the last point the weight stays. One point: a constant.
        shape (`str`, *optional*, defaults to `"linear"`):
            Between two points: `"linear"`, half a `"cosine"` wave, or `"steps"`, which holds the earlier weight.

    Raises:
        ValueError: for points that don't ascend or aren't finite, and for an unknown shape.

    Example:

    ```python
    ObjectiveSchedule([(0.2, 0.0), (0.8, 1.0)])  # nothing at first, then more and more
    ObjectiveSchedule([(0.0, 1.0), (0.5, 0.1)], shape="steps")
    ```
    """

    points: Sequence[tuple[float, float]]
    shape: str = "linear"

    def __post_init__(self) -> None:
        require(
            self.shape in SHAPES, f"shape={self.shape!r} is unknown. Choose one of {', '.join(map(repr, SHAPES))}."
        )
        shares = [share for share, _ in self.points]
        require(
            bool(shares) and shares == sorted(set(shares)) and shares[0] >= 0 and shares[-1] <= 1,
            f"points={list(self.points)}: shares of the run must ascend within [0, 1], at least one of them.",
        )
        require(
            all(math.isfinite(weight) for _, weight in self.points),
            f"points={list(self.points)}: weights must be finite.",
        )

    def __call__(self, share: float) -> float:
        """The weight after `share` of the run, in [0, 1]."""
        before = [point for point in self.points if point[0] <= share] or [self.points[0]]
        after = [point for point in self.points if point[0] > share] or [self.points[-1]]
        (x, weight), (end, target) = before[-1], after[0]
        if end <= x or share <= x or self.shape == "steps":
            return weight
        passed = (share - x) / (end - x)
        if self.shape == "cosine":
            passed = (1 - math.cos(math.pi * passed)) / 2
        return weight + (target - weight) * passed


@dataclass(frozen=True)
class RewardConstraint:
    """
    Keep the mean of a reward at or above a floor. (For a ceiling, negate the reward and its bound.)

    Args:
        reward (`str`):
            Name of the reward function, as it is logged.
        floor (`float`):
            In units of the reward.
        learning_rate (`float`):
            Of λ, per generation batch and unit of shortfall. The weight of the other rewards sets the scale: with
            weights about 1 and rewards in [0, 1], 0.1 brings λ to 1 after 100 batches that miss the floor by 0.1.
        initial (`float`, *optional*, defaults to `0.0`):
            λ of the first batch.
        maximum (`float`, *optional*):
            Largest λ. `None`: any. A floor out of reach lets λ grow without end, and everything else drown.

    Raises:
        ValueError: for settings outside of their range.
    """

    reward: str
    floor: float
    learning_rate: float
    initial: float = 0.0
    maximum: float | None = None

    def __post_init__(self) -> None:
        about = f"RewardConstraint of {self.reward!r}: "
        require(math.isfinite(self.floor), f"{about}floor={self.floor!r} must be finite.")
        require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            f"{about}learning_rate={self.learning_rate!r} must be positive.",
        )
        most = math.inf if self.maximum is None else self.maximum
        require(
            0 <= self.initial <= most and self.initial < math.inf,
            f"{about}initial={self.initial!r} must not be negative, nor above maximum={self.maximum!r}.",
        )

    def updated(self, multiplier: float, mean: float) -> float:
        """
        λ after a batch.

        Args:
            multiplier (`float`):
                λ that the batch was trained with.
            mean (`float`):
                Mean of the reward over the batch, on all ranks. NaN, if it applied to no completion: λ stays.
        """
        if not math.isfinite(mean):
            return multiplier
        raised = max(0.0, multiplier + self.learning_rate * (self.floor - mean))
        return raised if self.maximum is None else min(raised, self.maximum)


class RewardObjectives(RolloutObserver):
    """
    Schedules and constraints for the reward functions of a trainer of `trl_ext`, whichever its method.

    The weight of a reward is what its schedule says (TRL's `reward_weights` where there is none), plus λ if it is
    constrained. So a reward that is only a constraint has the weight 0 in `reward_weights`; one that counts anyway
    and has a floor beside it keeps its own.

    Logged for every generation batch (averaged where a log has several): `rewards/<name>/weight`, beside TRL's
    `rewards/<name>/mean`, and for constraints `rewards/<name>/multiplier`, the λ in that weight, and
    `rewards/<name>/shortfall`, floor − mean. The mean is TRL's: over all completions of all ranks that were generated
    for the batch and to which the reward applies.

    λ and the weights are part of the run's state: a checkpoint holds them, and a resumed run goes on bit for bit.

    Args:
        schedules (`Mapping[str, ObjectiveSchedule | float]`, *optional*):
            By name of the reward function.
        constraints (`Sequence[RewardConstraint]`, *optional*):
            One a reward at most.
        normalize (`bool`, *optional*, defaults to `False`):
            Divide all weights by 1 + the sum of all λ, so that a growing λ doesn't make rewards grow (which a critic
            has to follow; advantages that are scaled by their deviation don't care).

    Raises:
        ValueError: without any of the two, and for two constraints of one reward.

    Example:

    ```python
    trainer = PPOTrainer(..., reward_funcs=[helpful, harmless, brief], args=PPOConfig(reward_weights=[1.0, 0.0, 1.0]))
    RewardObjectives(
        schedules={"brief": ObjectiveSchedule([(0.5, 0.0), (1.0, 0.3)])},
        constraints=[RewardConstraint("harmless", floor=0.9, learning_rate=0.1)],
    ).attach(trainer)
    trainer.train()
    ```
    """

    key = "reward_objectives"

    def __init__(
        self,
        schedules: Mapping[str, "ObjectiveSchedule | float"] | None = None,
        constraints: Sequence[RewardConstraint] = (),
        normalize: bool = False,
    ) -> None:
        self.schedules = {
            name: given if isinstance(given, ObjectiveSchedule) else ObjectiveSchedule([(0.0, given)])
            for name, given in (schedules or {}).items()
        }
        self.constraints = {constraint.reward: constraint for constraint in constraints}
        names = [constraint.reward for constraint in constraints]
        require(
            len(self.constraints) == len(names), f"Constraints of {', '.join(names)}: one reward can have one floor."
        )
        require(
            bool(self.schedules or self.constraints),
            "RewardObjectives without schedules and constraints does nothing. Give it one, or use `reward_weights`.",
        )
        self.normalize = normalize
        self.multipliers = {name: constraint.initial for name, constraint in self.constraints.items()}
        self._base: dict[str, float] = {}
        self._trainer: Any = None

    def weights(self, names: Sequence[str], share: float) -> list[float]:
        """
        Weights of the reward functions `names`, with the λ of now, after `share` of the run.
        """
        total = 1 + sum(self.multipliers.values()) if self.normalize else 1.0
        scheduled = [
            self.schedules[name](share) if name in self.schedules else self._base.get(name, 1.0) for name in names
        ]
        return [(own + self.multipliers.get(name, 0.0)) / total for name, own in zip(names, scheduled, strict=True)]

    def attach(self, trainer: Any) -> "RewardObjectives":
        """
        Take over the weights of a trainer, before it trains.

        Args:
            trainer ([`~trl_ext.GRPOTrainer`]):
                Or one that is derived from it.

        Raises:
            TypeError: for a trainer that isn't one of `trl_ext`, which can't tell when a generation batch begins.
            ValueError: for a name that no reward function has, or several; and if the trainer has objectives already.
        """
        if not hasattr(trainer, "add_observer"):
            raise TypeError(
                f"RewardObjectives needs a trainer of trl_ext, not {type(trainer).__name__}: change the import, keep "
                "the rest."
            )
        names = list(trainer.reward_func_names)
        for name in [*self.schedules, *self.constraints]:
            require(
                names.count(name) == 1,
                f"{name!r} must be the name of one reward function, but they are {', '.join(names)}.",
            )
        require(
            self.key not in [observer.key for observer in trainer.observers],
            "This trainer has objectives already. Put all schedules and constraints into one RewardObjectives.",
        )
        self.multipliers = {name: constraint.initial for name, constraint in self.constraints.items()}
        self._base = dict(zip(names, trainer.reward_weights.tolist(), strict=True))
        self._trainer = trainer
        trainer.add_observer(self)
        return self

    def begin(self, trainer: Any) -> None:
        """Sets the weights of the batch."""
        names = trainer.reward_func_names
        trainer.reward_weights = torch.tensor(self.weights(names, trainer.progress), dtype=torch.float32)

    def end(self, trainer: Any, batch: GenerationBatch) -> None:
        """Logs what the batch was weighed with, and moves λ for the next."""
        metrics = trainer.train_metrics
        for name, weight in zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True):
            metrics[f"rewards/{name}/weight"].append(weight)
        for name, constraint in self.constraints.items():
            mean = metrics[f"rewards/{name}/mean"][-1]
            metrics[f"rewards/{name}/multiplier"].append(self.multipliers[name])
            metrics[f"rewards/{name}/shortfall"].append(constraint.floor - mean)
            self.multipliers[name] = constraint.updated(self.multipliers[name], mean)

    def state_dict(self) -> dict[str, Any]:
        """λ, and the weights of the batch in use."""
        return {"multipliers": dict(self.multipliers), "weights": self._trainer.reward_weights.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]. The weights are those that an evaluation before the next batch reads."""
        self.multipliers |= {name: state["multipliers"].get(name, value) for name, value in self.multipliers.items()}
        if len(state["weights"]) == len(self._trainer.reward_func_names):
            self._trainer.reward_weights = torch.tensor(state["weights"], dtype=torch.float32)
