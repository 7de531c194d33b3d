"""
Is the run still on the road? Callbacks that read what a trainer logs, ours or TRL's own, and say when it isn't.

| check | reads | healthy |
|---|---|---|
| [`KLCheck`] | `objective/kl`, `kl` | 0.5 to 2 nats per completion |
| [`PreferenceAccuracyCheck`] | `rewards/accuracies`, `accuracy`, also of evaluation | above 0.75 |
| [`EntropyCheck`] | `entropy`, `computed/entropy` | above a fifth of its start |
| [`RewardHackingCheck`] | `reward`, and a `held_out/…` metric | not: reward up, held-out metric down |
| [`LengthCheck`] | `completions/mean_length` | half to twice its start |
| [`ExplainedVarianceCheck`] | `val/explained_variance` | above 0 |

[`HealthChecks`] is all of them; what a trainer doesn't log is not checked. A log that isn't healthy is noise;
`patience` of them in a row are an episode. It is told once, with what to try, and over after `patience` healthy logs.
With `stop=True` it ends the run with a checkpoint. Logs are the same on all processes, so that all decide alike.

Each adds what it measured to the log that it read: `health/<name>`, and `health/<name>_alarm`, 1 during an episode.

What a check knows is a function of `state.log_history`, which every checkpoint holds: a resumed run reads it again and
goes on as if it had never stopped. An episode that had been told is not told again and doesn't stop the run again.
"""

import math
import re
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, ClassVar

from scipy import stats
from transformers import TrainerCallback

from ..errors import require
from ..evaluation.held_out import LOG_PREFIX
from .health_check import Alarm, HealthCheck, Logs


class KLCheck(HealthCheck):
    """
    KL to the reference: too little, and the policy doesn't learn; too much, and it leaves what the reward is made for.

    PPO's `objective/kl` is a mean per completion. `kl` of GRPO, RLOO and their relatives is a mean per token: it is
    multiplied by `completions/mean_length`, which is exact where all micro-batches of a log hold equally many tokens
    (and close otherwise). Both are estimates on samples of the policy, of KL(π_θ‖π_ref). GRPO logs none if `beta=0`.

    Args:
        band (`tuple[float, float]`, *optional*, defaults to `(0.5, 2.0)`):
            Healthy KL, in nats. The lower end holds after `grace`, since a run starts at 0.
        per (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"` or `"token"`: what the band is given for.
        patience, grace, stop (*optional*):
            See [`HealthCheck`].
    """

    name = "kl"
    advice = (
        "Above the band, try a larger KL coefficient (`kl_coef`, `beta`), a target for it (`kl_target`), a lower "
        "learning rate or fewer epochs on a batch. Below it, the reverse."
    )

    def __init__(
        self,
        band: tuple[float, float] = (0.5, 2.0),
        per: str = "sequence",
        *,
        patience: int = 5,
        grace: float = 0.25,
        stop: bool = False,
    ) -> None:
        _require_band("band", band, -math.inf)
        require(per in ("sequence", "token"), f"per={per!r} is unknown. Choose 'sequence' or 'token'.")
        self.band = band
        self.per = per
        super().__init__(patience=patience, grace=grace, stop=stop)

    def read(self, logs: Logs) -> float | None:
        sequence, token, length = (_number(logs, key) for key in ("objective/kl", "kl", "completions/mean_length"))
        if self.per == "sequence":
            if sequence is not None or token is None or length is None:
                return sequence
            return token * length
        if sequence is not None:
            return sequence / length if length else None
        return token

    def complaint(self, value: float, early: bool) -> str | None:
        low, high = self.band
        side = "above" if value > high else "below" if value < low and not early else None
        unit = "completion" if self.per == "sequence" else "token"
        return side and f"KL to the reference is {value:.3g} nats per {unit}, {side} its band of {low:g} to {high:g}"


class PreferenceAccuracyCheck(HealthCheck):
    """
    Share of pairs whose chosen completion is scored higher: by DPO's implicit reward, or by a reward model.

    Args:
        threshold (`float`, *optional*, defaults to `0.75`):
            Healthy is what lies above.
        metric (`str`, *optional*):
            The key of the log. `None`: `eval_rewards/accuracies` or `eval_accuracy` once a log has it (of several
            evaluation sets with names, that of the first), until then, and in a run without evaluation,
            `rewards/accuracies` or `accuracy`.
        patience, grace, stop (*optional*):
            See [`HealthCheck`]. Accuracy starts at chance, so that `grace` is a quarter of the run.
    """

    name = "preference_accuracy"
    advice = (
        "Try more steps or a higher learning rate, a smaller `beta`, and a look at the pairs: are labels noisy "
        "(`label_smoothing`), margins small, or the prompts unlike those of training?"
    )
    KEYS: ClassVar = ("rewards/accuracies", "accuracy")

    def __init__(
        self,
        threshold: float = 0.75,
        metric: str | None = None,
        *,
        patience: int = 5,
        grace: float = 0.25,
        stop: bool = False,
    ) -> None:
        require(0 < threshold < 1, f"threshold={threshold!r} is a share of pairs and must be in (0, 1).")
        self.threshold = threshold
        self.metric = metric
        super().__init__(patience=patience, grace=grace, stop=stop)

    def reset(self) -> None:
        super().reset()
        self.key: str | None = self.metric

    def read(self, logs: Logs) -> float | None:
        if self.metric is None and not (self.key or "").startswith("eval_"):
            # An evaluation set with a name has it between "eval_" and each metric, the loss among them
            sets = ["eval_", *(key.removesuffix("loss") for key in logs if re.fullmatch("eval_.+_loss", key))]
            known = [f"{prefix}{key}" for prefix in (*sets, "") for key in self.KEYS]
            better = next((key for key in known if key in logs), self.key)
            if better != self.key:  # logs of one kind in a row
                self.key, self.sick_logs, self.healthy_logs = better, 0, 0
        return None if self.key is None else _number(logs, self.key)

    def complaint(self, value: float, early: bool) -> str | None:
        if early or value > self.threshold:
            return None
        return f"preference accuracy ({self.key}) is {value:.3f}, not above {self.threshold:g}"


class _AgainstStart(HealthCheck):
    """A quantity whose mean over the first logs is its own measure."""

    def __init__(self, start_logs: int, *, patience: int, grace: float, stop: bool) -> None:
        require(
            isinstance(start_logs, int) and start_logs >= 1,
            f"start_logs={start_logs!r} must be a whole number, 1 or more.",
        )
        self.start_logs = start_logs
        super().__init__(patience=patience, grace=grace, stop=stop)

    def reset(self) -> None:
        super().reset()
        self._first: list[float] = []

    @property
    def start(self) -> float | None:
        """Mean over the first logs; `None` before they are there."""
        return fmean(self._first) if len(self._first) == self.start_logs else None

    def observe(self, logs: Logs, step: int, max_steps: int) -> Alarm | None:
        alarm = super().observe(logs, step, max_steps)
        if self.value is not None and len(self._first) < self.start_logs:
            self._first.append(self.value)
        return alarm


class EntropyCheck(_AgainstStart):
    """
    Entropy of the policy, in nats per token: once it has collapsed, all samples of a prompt are alike, and nothing is
    left to learn from.

    Args:
        floor (`float`, *optional*, defaults to `0.2`):
            Healthy is what lies above this share, in (0, 1), of the start.
        start_logs (`int`, *optional*, defaults to `3`):
            The start is the mean of so many first logs.
        patience, stop (*optional*):
            See [`HealthCheck`].
    """

    name = "entropy"
    advice = (
        "Try a higher upper clip (`epsilon_high=0.28`), an entropy bonus (`entropy_coef`), a lower learning rate, a "
        "KL term, or harder prompts. Going on from an earlier checkpoint is better than from here."
    )

    def __init__(
        self, floor: float = 0.2, start_logs: int = 3, *, patience: int = 5, grace: float = 0.0, stop: bool = False
    ) -> None:
        require(0 < floor < 1, f"floor={floor!r} is a share of the first entropy and must be in (0, 1).")
        self.floor = floor
        super().__init__(start_logs, patience=patience, grace=grace, stop=stop)

    def read(self, logs: Logs) -> float | None:
        # Where rows without advantage aren't computed, that of the others is all there is
        found = (_number(logs, key) for key in ("entropy", "policy/entropy_avg", "computed/entropy"))
        return next((entropy for entropy in found if entropy is not None), None)

    def complaint(self, value: float, early: bool) -> str | None:
        if early or self.start is None or self.start <= 0 or value > self.floor * self.start:
            return None
        share = value / self.start
        return f"entropy is {value:.3g} nats per token, {share:.0%} of the {self.start:.3g} that it started with"


class LengthCheck(_AgainstStart):
    """
    Mean length of completions, in tokens, against its start: rewards that can be had by length alone are. Where a
    curriculum lets completions grow, it is the share of their limit.

    Args:
        band (`tuple[float, float]`, *optional*, defaults to `(0.5, 2.0)`):
            Healthy multiples of the start.
        start_logs (`int`, *optional*, defaults to `3`):
            The start is the mean of so many first logs.
        patience, stop (*optional*):
            See [`HealthCheck`].
    """

    name = "length"
    advice = (
        "Read some completions: is that what the prompts ask for? If not, try a reward that doesn't grow with length, "
        "the overlong punishment (`soft_punish_cache`), a token-level loss (`loss_type='dapo'`), or a KL term."
    )

    def __init__(
        self,
        band: tuple[float, float] = (0.5, 2.0),
        start_logs: int = 3,
        *,
        patience: int = 5,
        grace: float = 0.0,
        stop: bool = False,
    ) -> None:
        _require_band("band", band, 0.0)
        self.band = band
        super().__init__(start_logs, patience=patience, grace=grace, stop=stop)

    def reset(self) -> None:
        super().reset()
        self._limit: float | None = None

    def read(self, logs: Logs) -> float | None:
        limit, length = _number(logs, "curriculum/completion_length"), _number(logs, "completions/mean_length")
        self._limit = self._limit if limit is None else limit
        return length if length is None or not self._limit else length / self._limit

    def complaint(self, value: float, early: bool) -> str | None:
        if early or not self.start:
            return None
        low, high = self.band
        ratio = value / self.start
        side = "more than" if ratio > high else "less than" if ratio < low else None
        bound = high if ratio > high else low
        unit, what = (".0f", "tokens") if self._limit is None else (".0%", "of their limit")
        now, start = f"{value:{unit}}", f"{self.start:{unit}}"
        return side and f"completions have {now} {what}, {side} {bound:g} times the {start} of the start"


class ExplainedVarianceCheck(HealthCheck):
    """
    Share of the returns' variance that the critic explains; at 0 and below, a constant would do as well.

    Args:
        threshold (`float`, *optional*, defaults to `0.0`):
            Healthy is what lies above; less than 1.
        patience, grace, stop (*optional*):
            See [`HealthCheck`]. A critic that starts at zero has to learn first.
    """

    name = "explained_variance"
    advice = (
        "Try a higher `critic_learning_rate`, `critic_warmup_steps`, more `value_updates_per_policy_update`, a larger "
        "`cliprange_value`, `reward_scaling='running'` if rewards are large, or a critic apart (`critic='model'`)."
    )

    def __init__(self, threshold: float = 0.0, *, patience: int = 5, grace: float = 0.25, stop: bool = False) -> None:
        require(threshold < 1, f"threshold={threshold!r} must be less than 1, which a perfect critic has.")
        self.threshold = threshold
        super().__init__(patience=patience, grace=grace, stop=stop)

    def read(self, logs: Logs) -> float | None:
        return _number(logs, "val/explained_variance")

    def complaint(self, value: float, early: bool) -> str | None:
        if early or value > self.threshold:
            return None
        return f"the critic's explained variance is {value:.3f}, not above {self.threshold:g}"


class RewardHackingCheck(HealthCheck):
    """
    Reward that goes up while a held-out metric goes down: the policy learns the reward, and not what it stands for.

    Judged with every held-out measurement, over the last `window` of them, by Mann and Kendall's one-sided trend test
    (exact; any monotone trend, no assumption on the noise, no look at single values): the metric must fall and the
    rewards between the measurements must rise, each with a p-value below `p_value`, and the metric by at least
    `min_fall` in all (by the Theil–Sen slope). Measurements without a trend, looked at 35 times, begin an episode in
    3.5 % of runs with the defaults even if the reward rises throughout (simulated).
    A measurement without a log of the reward since the last isn't counted.

    `health/reward_hacking` is the fall: minus the slope times the window, in units of the metric.

    Args:
        metric (`str`, *optional*):
            What tells the truth, under its key in the logs, as `held_out/exact_match` or `eval_accuracy`; higher must
            be better. `None`: the first `held_out/…` by the alphabet
            ([`~trl_ext.evaluation.held_out.HeldOut`] with `every`). Name it where that isn't the one.
        reward (`str`, *optional*, defaults to `"reward"`):
            Key of the reward that is optimised, in logs of training.
        window (`int`, *optional*, defaults to `6`):
            Measurements. Of `n`, no trend has a p-value below 1/n!: 5 are the fewest for 0.01.
        p_value (`float`, *optional*, defaults to `0.01`):
            Of each test.
        min_fall (`float`, *optional*, defaults to `0.01`):
            A fall that matters, in units of the metric.
        patience (`int`, *optional*, defaults to `2`):
            Measurements in a row.
        stop (*optional*):
            See [`HealthCheck`].
    """

    name = "reward_hacking"
    advice = (
        "Read completions with the highest rewards: what do they have that good ones don't? Try a larger KL "
        "coefficient, an ensemble instead of this reward or a constraint beside it, and an earlier checkpoint."
    )

    def __init__(
        self,
        metric: str | None = None,
        reward: str = "reward",
        window: int = 6,
        p_value: float = 0.01,
        min_fall: float = 0.01,
        *,
        patience: int = 2,
        grace: float = 0.0,
        stop: bool = False,
    ) -> None:
        require(isinstance(window, int) and window >= 3, f"window={window!r} must be a whole number, 3 or more.")
        require(0 < p_value < 0.5, f"p_value={p_value!r} must be in (0, 0.5).")
        smallest = 1 / math.factorial(window)  # of all orders, one falls throughout
        require(
            smallest < p_value,
            f"A trend over window={window} measurements has a p-value of {smallest:.2g} at least: it can't be below "
            f"p_value={p_value:g}. Widen the window.",
        )
        require(min_fall >= 0, f"min_fall={min_fall!r} must not be negative.")
        self.metric = metric
        self.reward = reward
        self.window = window
        self.p_value = p_value
        self.min_fall = min_fall
        super().__init__(patience=patience, grace=grace, stop=stop)

    def reset(self) -> None:
        super().reset()
        self.key: str | None = self.metric
        self._rewards: list[float] = []  # since the last measurement
        self._points: list[tuple[float, float]] = []  # held-out metric, mean reward that led to it

    def read(self, logs: Logs) -> float | None:
        reward = _number(logs, self.reward)
        if reward is not None:
            self._rewards.append(reward)
        if self.key is None:
            held_out = [key for key in logs if key.startswith(LOG_PREFIX) and f"{key}/low" in logs]
            self.key = min(held_out, default=None)  # not the first: a state that was saved has its keys sorted
        measured = None if self.key is None else _number(logs, self.key)
        if measured is None or not self._rewards:  # before training, say
            return None
        self._points = [*self._points, (measured, fmean(self._rewards))][-self.window :]
        self._rewards = []
        if len(self._points) < self.window:
            return None
        return -theil_sen_slope([metric for metric, _ in self._points]) * (self.window - 1)

    def complaint(self, value: float, early: bool) -> str | None:
        metrics, rewards = zip(*self._points, strict=True)
        falls, rises = trend_p_value(metrics, rising=False), trend_p_value(rewards, rising=True)
        if early or value < self.min_fall or not (falls < self.p_value and rises < self.p_value):
            return None
        return (
            f"reward went from {rewards[0]:.3g} to {rewards[-1]:.3g} (p = {rises:.2g}) while {self.key} went from "
            f"{metrics[0]:.3g} to {metrics[-1]:.3g} (p = {falls:.2g})"
        )


class HealthChecks(TrainerCallback):
    """
    All checks of this file, with their defaults, as one callback.

    Args:
        *checks ([`HealthCheck`]):
            Used instead of the default of the same name, or beside the defaults if there is none.
        stop (`bool`, *optional*, defaults to `False`):
            `stop` of the defaults.
        without (`Sequence[str]`, *optional*):
            Names of defaults to leave out.

    Attributes:
        checks (`dict[str, HealthCheck]`):
            By name.

    Raises:
        ValueError: for a name in `without` that no check has.
        TypeError: for a check that is none.

    Example:

    ```python
    HealthChecks(KLCheck(band=(0.0, 10.0)), stop=True, without=["length"]).add_to(trainer)
    ```
    """

    def __init__(self, *checks: HealthCheck, stop: bool = False, without: Sequence[str] = ()) -> None:
        for check in checks:
            if not isinstance(check, HealthCheck):
                raise TypeError(f"{check!r} is no HealthCheck. Pass checks such as KLCheck(band=(0.5, 4.0)).")
        defaults: list[HealthCheck] = [
            KLCheck(stop=stop),
            PreferenceAccuracyCheck(stop=stop),
            EntropyCheck(stop=stop),
            RewardHackingCheck(stop=stop),
            LengthCheck(stop=stop),
            ExplainedVarianceCheck(stop=stop),
        ]
        given = [check.name for check in checks]
        twice = sorted({name for name in given if given.count(name) > 1})
        require(not twice, f"{', '.join(twice)}: given twice. Add the second by trainer.add_callback.")
        self.checks = {check.name: check for check in (*defaults, *checks)}
        names = [without] if isinstance(without, str) else list(without)
        for name in names:
            require(
                name in self.checks, f"without={names}: there is no check {name!r}, only {', '.join(self.checks)}."
            )
            del self.checks[name]

    @property
    def alarms(self) -> list[Alarm]:
        """Of all checks, by step."""
        return sorted((alarm for check in self.checks.values() for alarm in check.alarms), key=lambda a: a.step)

    def add_to(self, trainer: Any) -> "HealthChecks":
        """
        Adds itself to a trainer, ours, TRL's or transformers', before its other callbacks, so that trackers get the
        metrics, too. (One of the trainer's `callbacks` comes after them: its metrics are in `log_history` only.)
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for check in self.checks.values():
            check.on_train_begin(*args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        for check in self.checks.values():
            check.on_log(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for check in self.checks.values():
            check.on_step_end(*args, **kwargs)


def trend_p_value(values: Sequence[float], rising: bool) -> float:
    """
    One-sided p-value of Mann and Kendall's test for a monotone trend (Mann, 1945): the chance that values without one
    stand at least so much in order. 1 where all are equal.

    Args:
        values (`Sequence[float]`):
            In the order of time.
        rising (`bool`):
            Whether a rising trend is tested, or a falling one.
    """
    found = stats.kendalltau(range(len(values)), values, alternative="greater" if rising else "less").pvalue
    return 1.0 if math.isnan(found) else float(found)


def theil_sen_slope(values: Sequence[float]) -> float:
    """Median of the slopes between all pairs of values, per place: one outlier doesn't turn it."""
    return median((values[j] - values[i]) / (j - i) for j in range(len(values)) for i in range(j))


def _number(logs: Logs, key: str) -> float | None:
    """A finite number of a log. TRL logs `None` for what no completion had."""
    value = logs.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _require_band(name: str, band: tuple[float, float], least: float) -> None:
    require(
        len(band) == 2 and least <= band[0] < band[1],
        f"{name}={band!r} must be two numbers, the lower one first" + (", none negative." if least == 0 else "."),
    )
