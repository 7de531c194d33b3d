"""
Callbacks that read what a trainer logs, ours or TRL's own, and warn when a run leaves its healthy range.

| check | reads | healthy |
|---|---|---|
| [`KLCheck`] | `objective/kl`, `kl` | 0.5 to 2 nats per completion |
| [`PreferenceAccuracyCheck`] | `rewards/accuracies`, `accuracy`, also of evaluation | above 0.75 |
| [`EntropyCheck`] | `entropy`, `computed/entropy` | above a fifth of its start |
| [`RewardHackingCheck`] | `reward`, and a `held_out/…` metric | the metric doesn't fall while the reward rises |
| [`LengthCheck`] | `completions/mean_length` | half to twice its start |
| [`ExplainedVarianceCheck`] | `val/explained_variance` | above 0 |

[`HealthChecks`] runs all of them; a check whose quantity a trainer doesn't log stays silent. A single unhealthy log
may be noise, so that it takes `patience` of them in a row to begin an episode. An episode is reported once, with
advice, and ends after `patience` healthy logs. With `stop=True` it ends the run with a checkpoint. Logs are the same
on all processes, so that all of them decide alike.

Each check adds what it measured to the log that it read: `health/<name>`, and `health/<name>_alarm`, which is 1 during
an episode.

The state of a check depends only on `state.log_history`, which every checkpoint contains: a resumed run reads that
history again and continues as if it had never stopped. An episode that was reported before is not reported again, and
doesn't stop the run again.
"""

import math
import re
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, ClassVar

from scipy import stats
from transformers import TrainerCallback

from .. import metric_keys
from ..errors import require, require_number, require_one_of, require_type, shown
from ..evaluation.held_out import LOG_PREFIX
from ..rollouts.statistics import COMPUTED
from .health_check import Alarm, HealthCheck, Logs


KL_UNITS = {"sequence": "completion", "token": "token"}
TRL_1_12_ENTROPY = "policy/entropy_avg"


class KLCheck(HealthCheck):
    """
    KL to the reference. With too little of it the policy learns nothing; with too much it leaves the region for which
    the reward was made.

    PPO's `objective/kl` is a mean per completion. The `kl` of GRPO, RLOO and their relatives is a mean per token: it
    is multiplied by `completions/mean_length`, which is exact if all micro-batches of a log have equally many tokens,
    and close otherwise. Both estimate KL(π_θ‖π_ref) on samples of the policy. GRPO logs neither if `beta=0`.

    Args:
        band (`tuple[float, float]`, *optional*, defaults to `(0.5, 2.0)`):
            Healthy KL, in nats. The lower end applies after `grace`, because a run starts at 0.
        per (`str`, *optional*, defaults to `"sequence"`):
            Whether the band is in nats per `"sequence"` (completion) or per `"token"`.
        patience, grace, stop (*optional*):
            See [`HealthCheck`].
    """

    name = "kl"
    advice = (
        "Above the band, try a larger KL coefficient (`kl_coef`, `beta`), a KL target (`kl_target`), a lower learning "
        "rate, or fewer epochs per generation batch. Below the band, try the opposite."
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
        require_one_of("per", per, KL_UNITS)
        self.band = band
        self.per = per
        super().__init__(patience=patience, grace=grace, stop=stop)

    def read(self, logs: Logs) -> float | None:
        sequence = _number(logs, metric_keys.KL_PER_COMPLETION)
        token, length = _number(logs, metric_keys.KL_PER_TOKEN), _number(logs, metric_keys.MEAN_LENGTH)
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
        kl = f"{value:.3g} nats per {KL_UNITS[self.per]}"
        return side and f"KL to the reference is {kl}, {side} its band of {low:g} to {high:g}"


class PreferenceAccuracyCheck(HealthCheck):
    """
    Share of pairs whose chosen completion has the higher score, by DPO's implicit reward or by a reward model.

    Args:
        threshold (`float`, *optional*, defaults to `0.75`):
            An accuracy above it is healthy.
        metric (`str`, *optional*):
            The key in the logs. `None`: `eval_rewards/accuracies` or `eval_accuracy` once a log contains it (if there
            are several named evaluation sets, that of the first one); before that, and in a run without evaluation,
            `rewards/accuracies` or `accuracy`.
        patience, grace, stop (*optional*):
            See [`HealthCheck`]. `grace` is a quarter of the run by default, because accuracy starts at chance.
    """

    name = "preference_accuracy"
    advice = (
        "Try more steps, a higher learning rate or a smaller `beta`, and look at the pairs: are labels noisy "
        "(`label_smoothing`), are margins small, or are the prompts unlike those of training?"
    )
    KEYS: ClassVar = (metric_keys.PREFERENCE_ACCURACY, metric_keys.REWARD_MODEL_ACCURACY)

    def __init__(
        self,
        threshold: float = 0.75,
        metric: str | None = None,
        *,
        patience: int = 5,
        grace: float = 0.25,
        stop: bool = False,
    ) -> None:
        require_number("threshold", threshold)
        require(0 < threshold < 1, f"threshold={threshold!r} is a share of pairs and must be in (0, 1).")
        self.threshold = threshold
        self.metric = metric
        super().__init__(patience=patience, grace=grace, stop=stop)

    def reset(self) -> None:
        super().reset()
        self.key: str | None = self.metric

    def read(self, logs: Logs) -> float | None:
        evaluation = metric_keys.EVALUATION
        if self.metric is None and not (self.key or "").startswith(evaluation):
            # The name of an evaluation set stands between "eval_" and each of its metrics, one of which is the loss
            sets = [evaluation, *(k.removesuffix("loss") for k in logs if re.fullmatch(f"{evaluation}.+_loss", k))]
            known = [f"{prefix}{key}" for prefix in (*sets, "") for key in self.KEYS]
            better = next((key for key in known if key in logs), self.key)
            if better != self.key:  # only logs of one key count as "in a row"
                self.key, self.unhealthy_logs, self.healthy_logs = better, 0, 0
        return None if self.key is None else _number(logs, self.key)

    def complaint(self, value: float, early: bool) -> str | None:
        if early or value > self.threshold:
            return None
        return f"preference accuracy ({self.key}) is {value:.3f}, not above {self.threshold:g}"


class _AgainstStart(HealthCheck):
    """A quantity that is compared with its own mean over the first logs."""

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
        """Mean over the first `start_logs` logs; `None` before there are that many."""
        return fmean(self._first) if len(self._first) == self.start_logs else None

    def observe(self, logs: Logs, step: int, max_steps: int) -> Alarm | None:
        alarm = super().observe(logs, step, max_steps)
        if self.value is not None and len(self._first) < self.start_logs:
            self._first.append(self.value)
        return alarm


class EntropyCheck(_AgainstStart):
    """
    Entropy of the policy, in nats per token. Once it has collapsed, all samples of a prompt are alike and there is
    nothing to learn from.

    Args:
        floor (`float`, *optional*, defaults to `0.2`):
            Share of the starting entropy, in (0, 1). An entropy above it is healthy.
        start_logs (`int`, *optional*, defaults to `3`):
            The starting entropy is the mean of this many first logs.
        patience, stop (*optional*):
            See [`HealthCheck`].
    """

    name = "entropy"
    advice = (
        "Try a higher upper clip (`epsilon_high=0.28`), an entropy bonus (`entropy_coef`), a lower learning rate, a "
        "KL term, or harder prompts. Resume from an earlier checkpoint rather than from here."
    )

    def __init__(
        self, floor: float = 0.2, start_logs: int = 3, *, patience: int = 5, grace: float = 0.0, stop: bool = False
    ) -> None:
        require_number("floor", floor)
        require(0 < floor < 1, f"floor={floor!r} is a share of the first entropy and must be in (0, 1).")
        self.floor = floor
        super().__init__(start_logs, patience=patience, grace=grace, stop=stop)

    def read(self, logs: Logs) -> float | None:
        # If rows without advantage aren't computed, only the entropy of the others is known
        keys = (metric_keys.ENTROPY, TRL_1_12_ENTROPY, f"{COMPUTED}{metric_keys.ENTROPY}")
        found = (_number(logs, key) for key in keys)
        return next((entropy for entropy in found if entropy is not None), None)

    def complaint(self, value: float, early: bool) -> str | None:
        if early or self.start is None or self.start <= 0 or value > self.floor * self.start:
            return None
        share = value / self.start
        return f"entropy is {value:.3g} nats per token, {share:.0%} of the {self.start:.3g} that it started with"


class LengthCheck(_AgainstStart):
    """
    Mean length of completions, in tokens, compared with its start. A policy finds any reward that length alone can
    earn. If a curriculum raises the length limit during the run, the length is taken as a share of that limit.

    Args:
        band (`tuple[float, float]`, *optional*, defaults to `(0.5, 2.0)`):
            Healthy multiples of the starting length.
        start_logs (`int`, *optional*, defaults to `3`):
            The starting length is the mean of this many first logs.
        patience, stop (*optional*):
            See [`HealthCheck`].
    """

    name = "length"
    advice = (
        "Read some completions: do the prompts ask for this length? If not, try a reward that doesn't grow with "
        "length, the overlong punishment (`soft_punish_cache`), a token-level loss (`loss_type='dapo'`), or a KL term."
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
        limit, length = _number(logs, metric_keys.COMPLETION_LIMIT), _number(logs, metric_keys.MEAN_LENGTH)
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
    Share of the returns' variance that the critic explains. At 0 and below, a constant would predict as well.

    Args:
        threshold (`float`, *optional*, defaults to `0.0`):
            An explained variance above it is healthy; less than 1.
        patience, grace, stop (*optional*):
            See [`HealthCheck`]. `grace` is a quarter of the run by default, because a critic has to learn first.
    """

    name = "explained_variance"
    advice = (
        "Try a higher `critic_learning_rate`, `critic_warmup_steps`, more `value_updates_per_policy_update`, a larger "
        "`cliprange_value`, `reward_scaling='running'` if rewards are large, or a separate critic (`critic='model'`)."
    )

    def __init__(self, threshold: float = 0.0, *, patience: int = 5, grace: float = 0.25, stop: bool = False) -> None:
        require_number("threshold", threshold)
        require(threshold < 1, f"threshold={threshold!r} must be less than 1, which a perfect critic has.")
        self.threshold = threshold
        super().__init__(patience=patience, grace=grace, stop=stop)

    def read(self, logs: Logs) -> float | None:
        return _number(logs, metric_keys.EXPLAINED_VARIANCE)

    def complaint(self, value: float, early: bool) -> str | None:
        if early or value > self.threshold:
            return None
        return f"the critic's explained variance is {value:.3f}, not above {self.threshold:g}"


class RewardHackingCheck(HealthCheck):
    """
    A reward that rises while a held-out metric falls: the policy learns to raise the reward by other means than those
    for which the reward was made.

    The check judges at every held-out measurement, over the last `window` of them, by Mann and Kendall's one-sided
    trend test, which is exact, finds any monotone trend and assumes nothing about the noise. It complains if the
    metric falls and the rewards logged between the measurements rise, each with a p-value below `p_value`, and if the
    metric has fallen by at least `min_fall` in total (by the Theil–Sen slope). In a simulation of a reward that rises
    throughout and a metric without a trend, 35 measurements began an episode in 3.5 % of runs with the defaults. A
    measurement is not counted if no reward was logged since the one before.

    `health/reward_hacking` is the fall: minus the slope times (`window` − 1), in units of the metric.

    Args:
        metric (`str`, *optional*):
            Key in the logs of the metric to trust, for example `held_out/exact_match` or `eval_accuracy`; higher must
            be better. `None`: the alphabetically first `held_out/…`
            ([`~trl_ext.evaluation.held_out.HeldOut`] with `every`).
        reward (`str`, *optional*, defaults to `"reward"`):
            Key of the optimised reward in the logs of training.
        window (`int`, *optional*, defaults to `6`):
            Number of measurements. With `n` of them, no trend has a p-value below 1/n!: 0.01 needs at least 5.
        p_value (`float`, *optional*, defaults to `0.01`):
            Significance level of each of the two tests.
        min_fall (`float`, *optional*, defaults to `0.01`):
            The smallest fall that matters, in units of the metric.
        patience (`int`, *optional*, defaults to `2`):
            How many measurements in a row begin an episode, or end it.
        grace, stop (*optional*):
            See [`HealthCheck`].
    """

    name = "reward_hacking"
    advice = (
        "Read the completions with the highest rewards: what do they have that good completions don't? Try a larger "
        "KL coefficient, an ensemble instead of this reward or a constraint beside it, and an earlier checkpoint."
    )

    def __init__(
        self,
        metric: str | None = None,
        reward: str = metric_keys.REWARD,
        window: int = 6,
        p_value: float = 0.01,
        min_fall: float = 0.01,
        *,
        patience: int = 2,
        grace: float = 0.0,
        stop: bool = False,
    ) -> None:
        require(isinstance(window, int) and window >= 3, f"window={window!r} must be a whole number, 3 or more.")
        for name, value in (("p_value", p_value), ("min_fall", min_fall)):
            require_number(name, value)
        require(0 < p_value < 0.5, f"p_value={p_value!r} must be in (0, 0.5).")
        smallest = 1 / math.factorial(window)  # one of all orders falls throughout
        require(
            smallest < p_value,
            f"A trend over window={window} measurements has a p-value of {smallest:.2g} at least, never below "
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
        self._points: list[tuple[float, float]] = []  # held-out metric, mean reward since the measurement before

    def read(self, logs: Logs) -> float | None:
        reward = _number(logs, self.reward)
        if reward is not None:
            self._rewards.append(reward)
        if self.key is None:
            held_out = [key for key in logs if key.startswith(LOG_PREFIX) and f"{key}/low" in logs]
            # Not the first in the log, because a state that was saved and loaded has its keys sorted
            self.key = min(held_out, default=None)
        measured = None if self.key is None else _number(logs, self.key)
        if measured is None or not self._rewards:  # as at a measurement before training
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


# Every check that [`HealthChecks`] runs by default. A new check is a class, and an entry here.
CHECKS: tuple[type[HealthCheck], ...] = (
    KLCheck,
    PreferenceAccuracyCheck,
    EntropyCheck,
    RewardHackingCheck,
    LengthCheck,
    ExplainedVarianceCheck,
)


class HealthChecks(TrainerCallback):
    """
    All of [`CHECKS`], with their default settings, as one callback.

    Args:
        *checks ([`HealthCheck`]):
            Each replaces the default check of the same name, or is added to the defaults if there is none.
        stop (`bool`, *optional*, defaults to `False`):
            `stop` of the default checks.
        without (`Sequence[str]`, *optional*):
            Names of checks to leave out.

    Attributes:
        checks (`dict[str, HealthCheck]`):
            By name.

    Raises:
        ValueError: for a name in `without` that no check has, and for two checks of one name.
        TypeError: for an argument that is not a check.

    Example:

    ```python
    HealthChecks(KLCheck(band=(0.0, 10.0)), stop=True, without=["length"]).add_to(trainer)
    ```
    """

    def __init__(self, *checks: HealthCheck, stop: bool = False, without: Sequence[str] = ()) -> None:
        for check in checks:
            if not isinstance(check, HealthCheck):
                raise TypeError(f"{shown(check)} is no HealthCheck. Pass checks such as KLCheck(band=(0.5, 4.0)).")
        defaults = [check_class(stop=stop) for check_class in CHECKS]
        given = [check.name for check in checks]
        twice = sorted({name for name in given if given.count(name) > 1})
        require(not twice, f"{', '.join(twice)}: given twice. Add the second by trainer.add_callback.")
        self.checks = {check.name: check for check in (*defaults, *checks)}
        require_type("without", without, str | list | tuple | set, "Pass names of checks, such as ['length'].")
        names = [without] if isinstance(without, str) else list(without)
        for name in names:
            require(
                name in self.checks, f"without={names}: there is no check {name!r}, only {', '.join(self.checks)}."
            )
            del self.checks[name]

    @property
    def alarms(self) -> list[Alarm]:
        """Alarms of all checks, in the order of steps."""
        return sorted((alarm for check in self.checks.values() for alarm in check.alarms), key=lambda a: a.step)

    def add_to(self, trainer: Any) -> "HealthChecks":
        """
        Adds itself to a trainer, ours, TRL's or transformers', before its other callbacks, so that trackers log the
        metrics too. (Passed in the trainer's `callbacks`, it would be called after the trackers, and its metrics would
        be in `log_history` only.)
        """
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(f"trainer is {shown(trainer)}. Pass a trainer, ours, TRL's or transformers'.")
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
    One-sided p-value of Mann and Kendall's test for a monotone trend (Mann, 1945): the probability that values without
    a trend are at least as much in order. 1 if all values are equal.

    Args:
        values (`Sequence[float]`):
            In temporal order.
        rising (`bool`):
            Whether to test for a rising trend, or for a falling one.
    """
    found = stats.kendalltau(range(len(values)), values, alternative="greater" if rising else "less").pvalue
    return 1.0 if math.isnan(found) else float(found)


def theil_sen_slope(values: Sequence[float]) -> float:
    """Median of the slopes between all pairs of values, per position: a single outlier hardly changes it."""
    return median((values[j] - values[i]) / (j - i) for j in range(len(values)) for i in range(j))


def _number(logs: Logs, key: str) -> float | None:
    """A finite number of a log. TRL logs `None` for a quantity that no completion has."""
    value = logs.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _require_band(name: str, band: tuple[float, float], least: float) -> None:
    require_type(name, band, list | tuple, "Pass two numbers, such as (0.5, 2.0).")
    for end in band:
        require_number(f"an end of {name}={band!r}", end)
    require(
        len(band) == 2 and least <= band[0] < band[1],
        f"{name}={band!r} must be two numbers, the lower one first" + (", none negative." if least == 0 else "."),
    )
