"""
Several objectives at once. TRL has fixed weights, and normalising before the sum. Added here are weights that follow a
schedule, and constraints, which keep the mean of one reward above a floor while a different reward is maximised.

A constraint turns `max E[A] subject to E[B] ≥ floor` into its Lagrangian `E[A] + λ·(E[B] − floor)`. The policy
maximises it: B gets the weight λ. The multiplier λ minimises it, with one step for each generation batch (dual
descent; for language models see https://huggingface.co/papers/2310.12773):

    λ ← max(0, λ + learning_rate · (floor − mean B))

The weights are set when a generation batch begins and stay the same until the next one begins, so that selection,
advantages, token credit and logs of a batch all have the same weights. A batch changes λ only for later batches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import require, require_number, require_type
from ..rollouts.choosers import RolloutObserver
from ..rollouts.generation_batch import GenerationBatch


SHAPES = ("linear", "cosine", "steps")


@dataclass(frozen=True)
class ObjectiveSchedule:
    """
    The weight of a reward as a function of the share of the run that is over.

    Args:
        points (`Sequence[tuple[float, float]]`):
            Pairs of a share of the run and the weight at that moment. Shares are in [0, 1] and ascend. The weight is
            constant before the first and after the last point; with one point it is always constant.
        shape (`str`, *optional*, defaults to `"linear"`):
            How the weight changes between two points: `"linear"`, as half a `"cosine"` wave, or in `"steps"`, which
            keep the earlier point's weight until the later point.

    Raises:
        ValueError: if shares don't ascend within [0, 1], if a weight is not finite, or if the shape is unknown.

    Example:

    ```python
    ObjectiveSchedule([(0.2, 0.0), (0.8, 1.0)])  # 0 at first, then growing to 1
    ObjectiveSchedule([(0.0, 1.0), (0.5, 0.1)], shape="steps")
    ```
    """

    points: Sequence[tuple[float, float]]
    shape: str = "linear"

    def __post_init__(self) -> None:
        require(
            self.shape in SHAPES, f"shape={self.shape!r} is unknown. Choose one of {', '.join(map(repr, SHAPES))}."
        )
        remedy = "Pass pairs of a share of the run and a weight, such as [(0.2, 0.0), (0.8, 1.0)]."
        require_type("points", self.points, list | tuple, remedy)
        for point in self.points:
            require_type("a point of points", point, list | tuple, remedy)
            require(len(point) == 2, f"points has {point}. {remedy}")
            for number in point:
                require_number(f"a number of the point {point}", number)
        shares = [share for share, _ in self.points]
        require(
            bool(shares) and shares == sorted(set(shares)) and shares[0] >= 0 and shares[-1] <= 1,
            f"points={list(self.points)}: there must be at least one, and their shares of the run must ascend within "
            "[0, 1].",
        )
        require(
            all(math.isfinite(weight) for _, weight in self.points),
            f"points={list(self.points)}: weights must be finite.",
        )

    def __call__(self, share: float) -> float:
        """The weight when `share` of the run is over, in [0, 1]."""
        before = [point for point in self.points if point[0] <= share] or [self.points[0]]
        after = [point for point in self.points if point[0] > share] or [self.points[-1]]
        (start, weight), (end, target) = before[-1], after[0]
        if end <= start or share <= start or self.shape == "steps":
            return weight
        passed = (share - start) / (end - start)
        if self.shape == "cosine":
            passed = (1 - math.cos(math.pi * passed)) / 2
        return weight + (target - weight) * passed


@dataclass(frozen=True)
class RewardConstraint:
    """
    Keeps the mean of a reward at or above a floor. (For a ceiling, negate the reward and the bound.)

    Args:
        reward (`str`):
            Name of the reward function, as in the logs.
        floor (`float`):
            The floor, in units of the reward.
        learning_rate (`float`):
            Change of λ for each generation batch and each unit of shortfall. The weights of the other rewards set the
            scale: with weights about 1 and rewards in [0, 1], a learning rate of 0.1 brings λ to 1 after 100 batches
            that miss the floor by 0.1.
        initial (`float`, *optional*, defaults to `0.0`):
            λ for the first batch.
        maximum (`float`, *optional*):
            Largest λ. `None`: λ has no limit; if the floor can't be reached, λ then grows until the other rewards no
            longer matter.

    Raises:
        ValueError: if a setting is out of its range.
    """

    reward: str
    floor: float
    learning_rate: float
    initial: float = 0.0
    maximum: float | None = None

    def __post_init__(self) -> None:
        require_type("reward", self.reward, str, "Pass the name of a reward function, as in the logs.")
        about = f"RewardConstraint of {self.reward!r}: "
        for name in ("floor", "learning_rate", "initial"):
            require_number(f"{about}{name}", getattr(self, name))
        if self.maximum is not None:
            require_number(f"{about}maximum", self.maximum)
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
                λ for the batch.
            mean (`float`):
                Mean of the reward over the batch on all ranks. With NaN (the reward applied to no completion), λ stays
                the same.
        """
        if not math.isfinite(mean):
            return multiplier
        moved = max(0.0, multiplier + self.learning_rate * (self.floor - mean))
        return moved if self.maximum is None else min(moved, self.maximum)


def _constant(name: str, weight: Any) -> ObjectiveSchedule:
    remedy = "Pass an ObjectiveSchedule, or a number for a constant weight."
    require_type(f"schedules[{name!r}]", weight, int | float, remedy)
    return ObjectiveSchedule([(0.0, weight)])


class RewardObjectives(RolloutObserver):
    """
    Schedules and constraints for the reward functions of any GRPO-based trainer of `trl_ext`.

    The weight of a reward is the value of its schedule, or its TRL `reward_weights` if it has no schedule, plus λ if
    it has a constraint. A reward that is only a constraint therefore gets the weight 0 in `reward_weights`; a reward
    that is an objective with a floor keeps its own weight.

    These metrics are logged for every generation batch, averaged if a log has several batches:

    - `rewards/<name>/weight`, besides TRL's `rewards/<name>/mean`.
    - For constraints, `rewards/<name>/multiplier`, the λ in that weight, and `rewards/<name>/shortfall`, which is
      floor − mean. The mean is TRL's: over all completions on all ranks that were generated for the batch and to which
      the reward applies.

    λ and the weights are part of the run's state: checkpoints hold them, and a resumed run equals the uninterrupted
    one bit for bit.

    Args:
        schedules (`Mapping[str, ObjectiveSchedule | float]`, *optional*):
            Schedules or constant weights, by name of the reward function.
        constraints (`Sequence[RewardConstraint]`, *optional*):
            At most one for each reward.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether to divide all weights by 1 + the sum of all λ, so that rewards don't grow with λ. A critic would
            have to learn that growth; advantages that are divided by their standard deviation don't change with it.

    Raises:
        ValueError: if there are neither schedules nor constraints, or if a reward has two constraints.

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
        if schedules is not None:
            require_type("schedules", schedules, Mapping, "Pass a dict from names of reward functions to schedules.")
        require_type("constraints", constraints, list | tuple, "Pass a list of RewardConstraint, also for one.")
        for constraint in constraints:
            require_type("a constraint of constraints", constraint, RewardConstraint, "Pass a RewardConstraint(...).")
        self.schedules = {
            name: given if isinstance(given, ObjectiveSchedule) else _constant(name, given)
            for name, given in (schedules or {}).items()
        }
        self.constraints = {constraint.reward: constraint for constraint in constraints}
        names = [constraint.reward for constraint in constraints]
        require(
            len(self.constraints) == len(names),
            f"The constraints are for {', '.join(names)}: a reward can have only one floor. Leave the others out.",
        )
        require(
            bool(self.schedules or self.constraints),
            "RewardObjectives without schedules and constraints does nothing. Pass one, or use `reward_weights`.",
        )
        self.normalize = normalize
        self.multipliers = {name: constraint.initial for name, constraint in self.constraints.items()}
        self._base: dict[str, float] = {}
        self._trainer: Any = None

    def weights(self, names: Sequence[str], share: float) -> list[float]:
        """Weights of the reward functions `names` with the current λ, when `share` of the run is over."""
        total = 1 + sum(self.multipliers.values()) if self.normalize else 1.0
        scheduled = [
            self.schedules[name](share) if name in self.schedules else self._base.get(name, 1.0) for name in names
        ]
        return [(own + self.multipliers.get(name, 0.0)) / total for name, own in zip(names, scheduled, strict=True)]

    def attach(self, trainer: Any) -> "RewardObjectives":
        """
        Set the reward weights of a trainer from now on. Must be called before training.

        Args:
            trainer ([`~trl_ext.GRPOTrainer`]):
                The trainer, or one of a derived class.

        Raises:
            TypeError: if the trainer is not one of `trl_ext`: TRL's don't report when a generation batch begins.
            ValueError: if a name is not that of exactly one reward function, or the trainer has objectives already.

        Returns:
            [`RewardObjectives`]: this object.
        """
        if not hasattr(trainer, "add_observer"):
            raise TypeError(
                f"RewardObjectives needs a trainer of trl_ext, not {type(trainer).__name__}. Change the import of the "
                "trainer, and keep the rest."
            )
        names = list(trainer.reward_func_names)
        for name in [*self.schedules, *self.constraints]:
            require(
                names.count(name) == 1,
                f"{name!r} must be the name of one reward function, but they are {', '.join(names)}. Change the name "
                "in schedules or constraints.",
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
        """Logs the weights of the batch, and updates λ for the next one."""
        metrics = trainer.train_metrics
        for name, weight in zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True):
            metrics[f"rewards/{name}/weight"].append(weight)
        for name, constraint in self.constraints.items():
            mean = metrics[f"rewards/{name}/mean"][-1]
            metrics[f"rewards/{name}/multiplier"].append(self.multipliers[name])
            metrics[f"rewards/{name}/shortfall"].append(constraint.floor - mean)
            self.multipliers[name] = constraint.updated(self.multipliers[name], mean)

    def state_dict(self) -> dict[str, Any]:
        """λ, and the weights of the current batch."""
        return {"multipliers": dict(self.multipliers), "weights": self._trainer.reward_weights.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]. An evaluation before the next batch uses these weights."""
        self.multipliers |= {name: state["multipliers"].get(name, value) for name, value in self.multipliers.items()}
        if len(state["weights"]) == len(self._trainer.reward_func_names):
            self._trainer.reward_weights = torch.tensor(state["weights"], dtype=torch.float32)
