"""
The settings of the engine ([`~trl_ext.GRPOTrainer`]): TRL's, three axes that combine freely, and what is refused.

| axis | values | table of its entries |
|---|---|---|
| `rollout_selection` | `all` · `refill` (DAPO) · `duplicate` (DUPO) | `rollouts/selection.py` |
| `advantage_estimator` | `group` · `leave_one_out` (RLOO) · `reinforce` · `gae` (PPO) | `objectives/advantages.py` |
| `importance_sampling_level` | `token` · `sequence` (GSPO) · `sequence_token` | `objectives/ratios.py` |
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import trl
from accelerate.logging import get_logger

from ..errors import require, require_one_of
from ..objectives.advantages import ESTIMATORS
from ..objectives.ratios import IMPORTANCE_LEVELS
from ..rollouts.outlook import REFILL_DRAWS
from ..rollouts.selection import SELECTIONS


logger = get_logger(__name__)

TOKEN_NORMALIZATIONS = ("generation_batch", "mini_batch")

# Losses that clip the ratio to 1 ± epsilon, and losses normalised by a count of tokens
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
TOKEN_COUNT_LOSSES = ("dapo", "cispo", "vespo")
# A sequence ratio is a geometric mean over tokens: it moves by 1e-4 to 1e-3 where a token ratio moves by 1e-1. Clip
# ranges in use lie well inside these borders (token 0.1–0.3, sequence 2e-4–3e-3).
SMALLEST_TOKEN_EPSILON = 0.005
LARGEST_SEQUENCE_EPSILON = 0.05


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """
    [`~trl.GRPOConfig`] with the axes of the engine. Every argument of TRL's keeps its meaning and, unless it is listed
    here, its default.

    Args:
        rollout_selection (`str`, *optional*, defaults to `"all"`):
            Which scored groups are trained on. `"all"`: TRL's behaviour. `"refill"`: groups without reward variance
            are replaced by groups of new prompts (DAPO's dynamic sampling). `"duplicate"`: they are replaced by random
            copies of groups that have variance (DUPO).
        max_refill_rounds (`int`, *optional*, defaults to `10`):
            Rounds of generation that `"refill"` may add to one batch. What is missing after that is filled with
            copies; if nothing has variance, the batch is used as TRL would use it.
        refill_draws (`str`, *optional*, defaults to `"blind"`):
            Which prompts `"refill"` generates for. `"blind"`: those the loader deals, and to refill the next of a
            shuffled stream (the DAPO paper). `"informed"`: those likely to have variance, by what their own groups and
            those of similar prompts showed so far; dealt prompts that are not are replaced before anything is
            generated for them, and come again in a later pass.
        similar_prompts_columns (`list[str]`, *optional*):
            Columns by which `"informed"` takes prompts for similar: a difficulty, a topic, a length, a pass rate.
            Numbers are cut at deciles.
        refill_exploration (`float`, *optional*, defaults to `0.1`):
            Share of the prompts that `"informed"` leaves to chance, so that none is starved.
        outcome_reward_funcs (`list[str]`, *optional*):
            Names of the reward functions by which a group is judged, in selection and for pass rates, as they appear
            in the logs. `None`: all, except
            TRL's soft overlong punishment, which shapes and doesn't judge.
        success_threshold (`float`, *optional*, defaults to `0.5`):
            Outcome reward from which a completion counts as solved, in metrics and pass rates.
        advantage_estimator (`str`, *optional*, defaults to `"group"`):
            `"group"`: TRL's group-relative advantage. `"leave_one_out"`: reward minus the mean of the others of the
            group. `"reinforce"`: the reward, minus a running baseline if `reinforce_baseline_momentum` is set.
        reinforce_baseline_momentum (`float`, *optional*):
            Momentum of the running mean that `"reinforce"` subtracts, in [0, 1). `None`: no baseline.
        importance_sampling_level (`str`, *optional*, defaults to `"token"`):
            TRL's `"token"` and `"sequence"`, and `"sequence_token"`: GSPO-token, a sequence ratio with the gradient of
            a token ratio, for advantages that differ between tokens.
        token_normalization (`str`, *optional*, defaults to `"generation_batch"`):
            What losses that divide by a token count (`dapo`, `cispo`, `vespo`) count: `"generation_batch"`, TRL's: all
            tokens of the generation, scaled to one step; `"mini_batch"`: the tokens of the optimizer step itself, as
            in the DAPO paper. The two agree when there is one optimizer step per generation.
        soft_punish_cache (`int`, *optional*, defaults to `0`):
            Tokens before `max_completion_length` over which TRL's soft overlong punishment grows to −1; it is added to
            the reward functions with weight 1. `0`: no punishment. (Overlong *filtering* is TRL's
            `mask_truncated_completions`.)
        updates_per_generation (`int`, *optional*):
            Optimizer steps per generation batch: sets `steps_per_generation` to this times
            `gradient_accumulation_steps`. `None`: the method's default, or what `steps_per_generation` or
            `generation_batch_size` say.
        epsilon (`float`, *optional*):
            Lower (and default upper) clip range. `None`: TRL's 0.2.
        scale_rewards (`str`, *optional*):
            TRL's argument. `None`: `"group"` for the group estimator, as in TRL, `"none"` for the others.
        use_bias_correction_kl (`bool`, *optional*):
            TRL's argument. `None`: `True` as in TRL, `False` under `"sequence_token"`, where it would be inexact.
        rewards_in_flight (`int`, *optional*):
            Calls of reward functions that run at the same time, in threads or, for async functions, on TRL's event
            loop. Each call gets one whole group, as soon as its chunk is generated. A call that fails or times out
            costs its group this reward and is logged with its sample; the others go on. Functions must be safe to
            call from several threads, and must not compare completions of different groups. `None`: TRL's way, one
            call for the whole batch after generation.
        reward_timeout (`float`, *optional*):
            Seconds that one call may take. `None`: any.
        generation_chunks (`int`, *optional*, defaults to `1`):
            Parts in which a generation batch is generated, so that rewards of one are computed while the next is
            generated. More chunks overlap more, and generate in smaller batches.
        fit_micro_batches (`bool`, *optional*, defaults to `True`):
            Whether the rows of an optimizer step are dealt to micro-batches that fit their lengths, and rows that
            can't move the policy are not computed. The gradient stays TRL's, up to rounding; what isn't exact for a
            loss is not done, and a log line says why. Micro-batches then differ in shape: where shapes are compiled
            for, set `pad_to_multiple_of`. `False`: TRL's micro-batches.
    """

    rollout_selection: str = field(
        default="all",
        metadata={"help": "Which scored groups are trained on: 'all', 'refill' (DAPO) or 'duplicate' (DUPO)."},
    )
    max_refill_rounds: int = field(
        default=10,
        metadata={"help": "Rounds of generation that 'refill' may add to one batch."},
    )
    refill_draws: str = field(
        default="blind",
        metadata={"help": "Which prompts 'refill' generates for: 'blind' draws, or those likely to have variance."},
    )
    similar_prompts_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns by which 'informed' draws take prompts for similar: a difficulty, a topic, a length."
        },
    )
    refill_exploration: float = field(
        default=0.1,
        metadata={"help": "Share of prompts that 'informed' draws leave to chance."},
    )
    outcome_reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions by which a group is judged. None: all but the soft overlong punishment."},
    )
    success_threshold: float = field(
        default=0.5,
        metadata={"help": "Outcome reward from which a completion counts as solved."},
    )
    advantage_estimator: str = field(
        default="group",
        metadata={"help": "'group', 'leave_one_out' or 'reinforce'."},
    )
    reinforce_baseline_momentum: float | None = field(
        default=None,
        metadata={"help": "Momentum of the running baseline of 'reinforce', in [0, 1). None: no baseline."},
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={"help": "'token', 'sequence' (GSPO) or 'sequence_token' (GSPO-token)."},
    )
    token_normalization: str | None = field(
        default="generation_batch",
        metadata={
            "help": "Tokens that token-count losses divide by: those of the 'generation_batch' or 'mini_batch'."
        },
    )
    soft_punish_cache: int | None = field(
        default=0,
        metadata={"help": "Tokens before max_completion_length over which the overlong punishment grows. 0: none."},
    )
    updates_per_generation: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps per generation batch. None: the method's default."},
    )
    epsilon: float | None = field(  # type: ignore[assignment]  # None is resolved in __post_init__
        default=None,
        metadata={"help": "Clip range. None: TRL's 0.2."},
    )
    scale_rewards: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "'group', 'batch' or 'none'. None: 'group' for the group estimator, 'none' for the others."},
    )
    use_bias_correction_kl: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "TRL's argument. None: True, except under 'sequence_token'."},
    )
    rewards_in_flight: int | None = field(
        default=None,
        metadata={"help": "Calls of reward functions, one group each, that run at once while the next are generated."},
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds that one call of a reward function may take, with rewards_in_flight."},
    )
    generation_chunks: int = field(
        default=1,
        metadata={"help": "Parts in which a batch is generated, with rewards_in_flight."},
    )
    fit_micro_batches: bool = field(
        default=True,
        metadata={"help": "Whether padding and rows that can't move the policy are left out where that is exact."},
    )

    # Whether the method's trainer has a critic, which `advantage_estimator="gae"` needs and no other can use
    _has_critic: ClassVar[bool] = False
    # Optimizer steps per generation batch where the user says nothing of it
    _updates_per_generation: ClassVar[int | None] = None
    # Sizes belong to the task and the machine: taken from a `trl.GRPOConfig` even where they are TRL's defaults
    _sizes: ClassVar[tuple[str, ...]] = ("max_completion_length", "num_generations", "steps_per_generation")

    def __post_init__(self) -> None:
        # Logged at the end: Accelerate's logger raises before its state exists, which TRL's `__post_init__` makes
        self._notes: list[str] = []
        self._resolve_method()
        # [`adopt`] must not mistake what is resolved below for what the user set
        self._left_open = {f.name for f in fields(self) if f.default is None and getattr(self, f.name) is None}
        self._check_axes()
        inherited: dict[str, Any] = {f.name: f.default for f in fields(trl.GRPOConfig)}
        if self.epsilon is None:
            self.epsilon = inherited["epsilon"]
        if self.scale_rewards is None:
            self.scale_rewards = ESTIMATORS[self.advantage_estimator].scale_rewards
        self._check_clip()
        self._check_sequence_token()
        if self.use_bias_correction_kl is None:
            self.use_bias_correction_kl = self.importance_sampling_level != "sequence_token"
        self._check_overlong()
        self._check_rewards_ahead()
        self._set_updates_per_generation()
        try:
            with self._shown_to_trl():
                super().__post_init__()
        except ValueError as error:
            if "divisible by num_generations" not in str(error):
                raise
            raise ValueError(
                f"{error} A generation batch holds whole groups: choose per_device_train_batch_size × processes × "
                "steps_per_generation (default: gradient_accumulation_steps) as a multiple of num_generations."
            ) from error
        self._check_token_normalization()
        for note in self._notes:
            logger.warning(note)

    def _resolve_method(self) -> None:
        """What a method takes over, resolves and refuses before everything else."""

    @contextmanager
    def _shown_to_trl(self) -> Iterator[None]:
        """What TRL checks where that isn't what is meant."""
        yield

    def _check_axes(self) -> None:
        critics = tuple(name for name, entry in ESTIMATORS.items() if entry.computed_by == "critic")
        require(
            self.advantage_estimator not in critics or self._has_critic,
            f"advantage_estimator={self.advantage_estimator!r} needs a critic. Use PPOConfig and PPOTrainer.",
        )
        for name, known in (
            ("rollout_selection", SELECTIONS),
            ("refill_draws", REFILL_DRAWS),
            ("advantage_estimator", critics if self._has_critic else [n for n in ESTIMATORS if n not in critics]),
            ("importance_sampling_level", IMPORTANCE_LEVELS),
            ("token_normalization", TOKEN_NORMALIZATIONS),
        ):
            value = getattr(self, name)
            if value is None and name in self._left_open:
                continue
            require_one_of(name, value, known)
        estimator = ESTIMATORS[self.advantage_estimator]
        momentum = self.reinforce_baseline_momentum
        if momentum is not None:
            require(
                "baseline" in estimator.needs,
                f"reinforce_baseline_momentum={momentum} has no effect with advantage_estimator="
                f"{self.advantage_estimator!r}. Set advantage_estimator='reinforce', or leave it out.",
            )
            require(
                0 <= momentum < 1, f"reinforce_baseline_momentum={momentum} must lie in [0, 1); 0.9 is a usual value."
            )
        scale = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)  # as TRL reads it
        require(
            scale not in estimator.refused_scales,
            f"scale_rewards={self.scale_rewards!r} makes no sense with advantage_estimator="
            f"{self.advantage_estimator!r}: {estimator.refused_scales.get(str(scale))}. Set scale_rewards='none' or "
            "'batch'.",
        )
        informed = self.refill_draws == "informed"
        require(
            not self.similar_prompts_columns or informed,
            f"similar_prompts_columns={self.similar_prompts_columns} has no effect with refill_draws="
            f"{self.refill_draws!r}. Set refill_draws='informed', or leave it out.",
        )
        require(
            not informed or self.rollout_selection == "refill",
            f"refill_draws='informed' has no effect with rollout_selection={self.rollout_selection!r}. Set "
            "rollout_selection='refill', or leave it out.",
        )
        require(
            0 <= self.refill_exploration <= 1,
            f"refill_exploration={self.refill_exploration} is a share of prompts: choose it in [0, 1].",
        )
        require(
            self.max_refill_rounds >= 1,
            f"max_refill_rounds={self.max_refill_rounds} must be at least 1. For no refilling at all, set "
            "rollout_selection='all' or 'duplicate'.",
        )

    def _check_clip(self) -> None:
        """A token ratio needs a token clip range, a sequence ratio a sequence one."""
        assert self.epsilon is not None
        if self.loss_type not in CLIPPED_LOSSES:
            return
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if IMPORTANCE_LEVELS[self.importance_sampling_level].of == "token":
            require(
                max(self.epsilon, high) >= SMALLEST_TOKEN_EPSILON,
                f"epsilon={self.epsilon}, epsilon_high={high} are clip ranges for sequence ratios (GSPO), but "
                "importance_sampling_level='token': most token ratios leave so narrow a range. Set "
                "importance_sampling_level='sequence', or epsilon=0.2.",
            )
        elif max(self.epsilon, high) > LARGEST_SEQUENCE_EPSILON:
            problem = (
                f"epsilon={self.epsilon}, epsilon_high={high} are clip ranges for token ratios, but "
                f"importance_sampling_level={self.importance_sampling_level!r}: hardly a sequence would ever be "
                "clipped. Set epsilon=3e-4 and epsilon_high=4e-4 (GSPO), or importance_sampling_level='token'."
            )
            # A script written for TRL, which sets the level and leaves the clip alone, runs as it does there
            if not {"epsilon", "epsilon_high"} <= self._left_open:
                raise ValueError(problem)
            self._notes.append(f"{problem} As in TRL, training goes on with it.")

    def _check_sequence_token(self) -> None:
        if self.importance_sampling_level != "sequence_token":
            return
        refused = {
            "use_bias_correction_kl": (bool(self.use_bias_correction_kl), "False"),
            "top_entropy_quantile": (self.top_entropy_quantile < 1.0, "1.0"),
            "loss_type": (self.loss_type == "vespo", "'grpo'"),
        }
        for name, (wrong, remedy) in refused.items():
            require(
                not wrong,
                f"{name}={getattr(self, name)!r} is not exact with importance_sampling_level='sequence_token'. Set "
                f"{name}={remedy}, or importance_sampling_level='sequence'.",
            )

    def _check_overlong(self) -> None:
        if self.soft_punish_cache is None:
            # The DAPO paper's proportion: 4,096 of 20,480
            self.soft_punish_cache = (self.max_completion_length or 0) // 5
        require(
            0 <= self.soft_punish_cache <= (self.max_completion_length or math.inf),
            f"soft_punish_cache={self.soft_punish_cache} must lie between 0 (no punishment) and "
            f"max_completion_length={self.max_completion_length}.",
        )

    def _check_rewards_ahead(self) -> None:
        if self.rewards_in_flight is None:
            for name, off in (("reward_timeout", None), ("generation_chunks", 1)):
                value = getattr(self, name)
                require(
                    value == off,
                    f"{name}={value} has no effect without rewards_in_flight: TRL calls reward functions once, after "
                    "generation. Set rewards_in_flight to the calls that may run at once, or leave it out.",
                )
            return
        require(
            self.rewards_in_flight >= 1,
            f"rewards_in_flight={self.rewards_in_flight} must be at least 1; None computes rewards after generation.",
        )
        require(
            self.reward_timeout is None or self.reward_timeout > 0,
            f"reward_timeout={self.reward_timeout} is no time to compute a reward in. Set seconds, or None for any.",
        )
        require(self.generation_chunks >= 1, f"generation_chunks={self.generation_chunks} must be at least 1.")

    def _set_updates_per_generation(self) -> None:
        updates = self.updates_per_generation
        sized = [name for name in ("steps_per_generation", "generation_batch_size") if getattr(self, name) is not None]
        if updates is None and not sized:
            updates = self._updates_per_generation
        if updates is None:
            return
        require(
            not sized,
            f"updates_per_generation={updates} and {' and '.join(sized)} both set the size of a generation batch. "
            "Set one of them.",
        )
        require(updates >= 1, f"updates_per_generation={updates} must be at least 1.")
        self.steps_per_generation = updates * self.gradient_accumulation_steps

    def _check_token_normalization(self) -> None:
        counts_tokens = self.loss_type in TOKEN_COUNT_LOSSES
        whole_steps = (self.steps_per_generation or 0) % self.gradient_accumulation_steps == 0
        if self.token_normalization is None:
            self.token_normalization = "mini_batch" if counts_tokens and whole_steps else "generation_batch"
        if self.token_normalization == "generation_batch":
            return
        require(
            counts_tokens,
            f"token_normalization='mini_batch' has no effect with loss_type={self.loss_type!r}. Set "
            "token_normalization='generation_batch', or loss_type='dapo'.",
        )
        require(
            whole_steps,
            f"token_normalization='mini_batch' needs whole optimizer steps in a generation batch, but "
            f"steps_per_generation={self.steps_per_generation} is no multiple of gradient_accumulation_steps="
            f"{self.gradient_accumulation_steps}. Change one of them, or set token_normalization='generation_batch'.",
        )

    @property
    def is_neutral(self) -> bool:
        """Whether every axis is at TRL's place: the same rollouts give TRL's gradient."""
        return (
            self.rollout_selection == "all"
            and self.advantage_estimator == "group"
            and self.importance_sampling_level != "sequence_token"
            and self.token_normalization == "generation_batch"
        )

    @classmethod
    def adopt(cls, args: trl.GRPOConfig) -> Self:
        """
        Take over a configuration written for TRL: what was set there is kept, as are all sizes; what was left at TRL's
        default follows this class.

        Args:
            args ([`~trl.GRPOConfig`]):
                A configuration of this class is returned as it is.

        Raises:
            TypeError: if it is the configuration of another of our methods.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, trl.GRPOConfig):
            raise TypeError(f"`args` must be a {cls.__name__} or a trl.GRPOConfig, not {type(args).__name__}.")
        ours = isinstance(args, GRPOConfig)
        if ours and not issubclass(cls, type(args)):
            raise TypeError(
                f"`args` is a {type(args).__name__}, whose defaults belong to another method. Pass a {cls.__name__}."
            )
        own = {f.name: f for f in fields(cls)}
        parents = {f.name: f for f in fields(GRPOConfig if ours else trl.GRPOConfig)}
        names = {name for name in own.keys() & parents.keys() if own[name].init}
        changed = {name for name in names if own[name].default != parents[name].default}
        left_open: set[str] = getattr(args, "_left_open", set()) - set(cls._sizes)
        taken = {
            name: getattr(args, name)
            for name in names - left_open
            if name not in changed or name in cls._sizes or getattr(args, name) != parents[name].default
        }
        # All but one of these were computed from the one that was set
        taken.pop("generation_batch_size", None)
        if taken.get("updates_per_generation") is not None:
            taken.pop("steps_per_generation")
        adopted = cls(**taken)
        for f in fields(args):  # what a user's own subclass adds
            if f.name not in own:
                setattr(adopted, f.name, getattr(args, f.name))
        return adopted
