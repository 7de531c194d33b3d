"""
Settings of [`~trl_ext.GRPOTrainer`]: TRL's, and four axes that can be combined freely. Combinations that would be
ignored or inexact are refused here.

| axis | values | table of the values |
|---|---|---|
| `rollout_selection` | `all` · `refill` (DAPO) · `duplicate` (DUPO) | `rollouts/selection.py` |
| `advantage_estimator` | `group` · `leave_one_out` · `maxrl` · `reinforce` · `gae` | `objectives/advantages.py` |
| `importance_sampling_level` | `token` · `sequence` · `sequence_token` · `sequence_product` | `objectives/ratios.py` |
| `trust_region` | `ratio_clip` · `binary_tv` · `binary_kl` (DPPO) | `objectives/trust_region.py` |
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Literal, Self

import trl
from accelerate.logging import get_logger

from ..errors import require, require_one_of
from ..objectives.advantages import ESTIMATORS
from ..objectives.ratios import IMPORTANCE_LEVELS
from ..objectives.trust_region import TRUST_REGIONS
from ..redaction import hidden_tokens
from ..rollouts.informed import PROMPT_FEATURES, REFILL_DRAWS
from ..rollouts.outlook import VALUES
from ..rollouts.selection import SELECTIONS
from .arguments import adopted
from .config_checks import check_types
from .engine_checks import VLLM_SYNCS, check_engine
from .generation_checks import check_generation, check_group_sizes
from .ratio_checks import check_ratios, note_idle_region
from .refill_config import RefillArguments, check_refilling
from .sampling import check_sampling


logger = get_logger(__name__)

TOKEN_NORMALIZATIONS = ("generation_batch", "mini_batch")
# Values of `share_prefixes`
SHARING = (True, False, "always")

# Values of TRL's `scale_rewards`
SCALES = ("none", "batch", "group")
# Losses that divide by a number of tokens
TOKEN_COUNT_LOSSES = ("dapo", "cispo", "vespo")


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """Values as one writes them into a yaml file."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


@dataclass
class GRPOConfig(RefillArguments, trl.GRPOConfig):
    """
    [`~trl.GRPOConfig`] with four axes: `rollout_selection`, `advantage_estimator`, `importance_sampling_level` and
    `trust_region`. Every argument of TRL keeps its meaning and, unless it is listed here, its default. The arguments
    of `rollout_selection="refill"` are in [`~trl_ext.trainers.refill_config.RefillArguments`].

    Args:
        rollout_selection (`str`, *optional*, defaults to `"all"`):
            Which groups are trained on once they are scored. `"all"`: all of them, as in TRL. `"refill"`: groups
            without reward variance are replaced by groups of new prompts (DAPO's dynamic sampling). `"duplicate"`:
            groups without reward variance are replaced by random copies of groups with variance (DUPO).
        outcome_reward_funcs (`list[str]`, *optional*):
            Names of the reward functions, as in the logs, that decide whether a group has variance, whether a
            completion is solved, and whether it can be scored: if all of them return `None` for it, it has no reward
            and no advantage. `None`: all functions except TRL's soft overlong punishment, which only shapes rewards.
        success_threshold (`float`, *optional*, defaults to `0.5`):
            Smallest outcome reward with which a completion counts as solved, in metrics and pass rates.
        advantage_estimator (`str`, *optional*, defaults to `"group"`):
            How advantages are computed from rewards. `"group"`: TRL's group-relative advantage. `"leave_one_out"`: the
            reward minus the mean reward of the group's other completions (RLOO). `"maxrl"`: the reward minus the mean
            reward of its group, divided by that mean (MaxRL); no reward may be negative. `"reinforce"`: the reward,
            minus a running mean if `reinforce_baseline_momentum` is set.
        reinforce_baseline_momentum (`float`, *optional*):
            Momentum, in [0, 1), of the running mean that `"reinforce"` subtracts. `None`: nothing is subtracted.
        importance_sampling_level (`str`, *optional*, defaults to `"token"`):
            Level of the importance ratio. `"token"` and `"sequence"`: as in TRL. `"sequence_token"`: GSPO-token, which
            has the value of a sequence ratio and the gradient of a token ratio, for advantages that differ between
            tokens. `"sequence_product"`: the ratio of a whole completion, which is the product of its tokens' ratios
            (RLOO), and not their geometric mean as with `"sequence"`.
        trust_region (`str`, *optional*, defaults to `"ratio_clip"`):
            What keeps the policy near the one that sampled. `"ratio_clip"`: the clip of TRL's loss. `"binary_tv"` and
            `"binary_kl"`: no clip; a token doesn't move the policy while the divergence of the two policies on it is
            above the threshold and the update would raise it further (DPPO). The divergence is a total variation or a
            KL, of the sampled token against the rest of the vocabulary.
        trust_region_threshold (`float`, *optional*):
            Largest divergence inside of the trust region, a difference of probabilities or in nats. `None`: 0.15 for
            `"binary_tv"`, 0.05 for `"binary_kl"`.
        token_normalization (`str`, *optional*, defaults to `"generation_batch"`):
            Which tokens are counted by losses that divide by a number of tokens (`dapo`, `cispo`, `vespo`).
            `"generation_batch"`: as in TRL, those of the generation batch, scaled to one optimizer step.
            `"mini_batch"`: those of the optimizer step, as in the DAPO paper. The two are equal if there is one
            optimizer step for each generation batch.
        soft_punish_cache (`int`, *optional*, defaults to `0`):
            Number of tokens before `max_completion_length` over which TRL's soft overlong punishment grows from 0 to
            −1. The punishment is added to the reward functions with weight 1. `0`: no punishment. (Overlong
            *filtering* is TRL's `mask_truncated_completions`.)
        updates_per_generation (`int`, *optional*):
            Optimizer steps for each generation batch. Sets `steps_per_generation` to this number times
            `gradient_accumulation_steps`. `None`: the method's default, unless `steps_per_generation` or
            `generation_batch_size` is set.
        max_num_generations (`int`, *optional*):
            Most completions of one prompt in a generation batch, a multiple of `num_generations`. Within the fixed
            size of the batch, `refill_draws="informed"` then decides how many times `num_generations` completions each
            prompt gets, before they are generated. Advantages compare all completions of a prompt, and are weighted so
            that every prompt counts the same. `None`: every prompt gets `num_generations`.
        epsilon (`float`, *optional*):
            Lower clip range, and the upper one unless `epsilon_high` is set. `None`: TRL's 0.2, or no clip if
            `trust_region` takes its place.
        scale_rewards (`str`, *optional*):
            TRL's argument. `None`: `"group"` for the estimator `"group"`, as in TRL, and `"none"` for the others.
        use_bias_correction_kl (`bool`, *optional*):
            TRL's argument. `None`: `True` as in TRL, but `False` with `"sequence_token"`, where it would be inexact.
        rewards_in_flight (`int`, *optional*):
            Largest number of calls of reward functions that run at the same time, in threads or, for async functions,
            on TRL's event loop. Each call gets one whole group, as soon as the group's chunk is generated. If a call
            fails or times out, its group gets no reward from it, the fault is logged with its sample, and the other
            calls continue. Functions must be safe to call from several threads, and must not compare completions of
            different groups. `None`: as in TRL, each function is called once for the whole batch, after generation.
        reward_timeout (`float`, *optional*):
            Seconds that one call of a reward function may take; a call that takes longer gives no rewards. Without
            `rewards_in_flight`, a call is for the whole batch of a process, so that a slow function can't have the
            other processes wait for longer than that. `None`: no limit.
        generation_chunks (`int`, *optional*, defaults to `1`):
            Number of chunks in which a batch is generated, with `rewards_in_flight`: rewards of one chunk are computed
            while the next is generated. With more chunks more time overlaps, but each chunk is a smaller batch.
        fit_micro_batches (`bool`, *optional*, defaults to `True`):
            Whether the rows of an optimizer step are dealt to micro-batches by their length, and rows that can't move
            the policy are not computed. The gradient is TRL's, up to rounding: what is not exact for a loss is not
            done, and a warning says why. The micro-batches then differ in shape; if shapes are compiled, set
            `pad_to_multiple_of`. `False`: TRL's micro-batches.
        share_prefixes (`bool` or `str`, *optional*, defaults to `True`):
            Whether completions of one prompt meet in a micro-batch and their passes compute the prompt once, where the
            gradient is TRL's up to rounding and that is cheaper by an estimate. `"always"`: at any cost. `False`: each
            completion computes its prompt. Without `fit_micro_batches` nothing is shared.
        vllm_sync (`str`, *optional*, defaults to `"weights"`):
            What a colocated vLLM engine gets when the policy has changed. `"weights"`: all of the policy's, with its
            adapter merged into them, as in TRL; to merge, ZeRO-3 gathers the whole model in every process.
            `"adapter"`: the LoRA adapter alone, which vLLM applies to the base that it has loaded. The policy is then
            given by its name, or has an adapter on the base as it was loaded.
    """

    rollout_selection: str = field(
        default="all",
        metadata={"help": "Which groups are trained on: 'all', 'refill' (DAPO) or 'duplicate' (DUPO)."},
    )
    outcome_reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the reward functions that decide whether a group has variance and a completion is "
            "solved. None: all except the soft overlong punishment."
        },
    )
    success_threshold: float = field(
        default=0.5,
        metadata={"help": "Smallest outcome reward with which a completion counts as solved."},
    )
    advantage_estimator: str = field(
        default="group",
        metadata={"help": "How advantages are computed: 'group', 'leave_one_out' (RLOO), 'maxrl' or 'reinforce'."},
    )
    reinforce_baseline_momentum: float | None = field(
        default=None,
        metadata={
            "help": "Momentum, in [0, 1), of the running mean that 'reinforce' subtracts. None: nothing is subtracted."
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "Level of the importance ratio: 'token', 'sequence' (GSPO), 'sequence_token' (GSPO-token) or "
            "'sequence_product' (RLOO)."
        },
    )
    trust_region: str = field(
        default="ratio_clip",
        metadata={
            "help": "What keeps the policy near the one that sampled: 'ratio_clip', 'binary_tv' or 'binary_kl' (DPPO)."
        },
    )
    trust_region_threshold: float | None = field(
        default=None,
        metadata={"help": "Largest divergence in the trust region. None: 0.15 for 'binary_tv', 0.05 for 'binary_kl'."},
    )
    token_normalization: str | None = field(
        default="generation_batch",
        metadata={
            "help": "Which tokens are counted by losses that divide by a number of tokens: those of the "
            "'generation_batch' or of the 'mini_batch'."
        },
    )
    soft_punish_cache: int | None = field(
        default=0,
        metadata={
            "help": "Number of tokens before max_completion_length over which the soft overlong punishment grows. "
            "0: no punishment."
        },
    )
    updates_per_generation: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps for each generation batch. None: the method's default."},
    )
    max_num_generations: int | None = field(
        default=None,
        metadata={
            "help": "Most completions of one prompt in a batch, a multiple of num_generations: 'informed' decides how "
            "many each prompt gets. None: num_generations."
        },
    )
    epsilon: float | None = field(  # type: ignore[assignment]  # None is resolved in __post_init__
        default=None,
        metadata={"help": "Lower clip range, and the upper one unless epsilon_high is set. None: TRL's 0.2."},
    )
    scale_rewards: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "TRL's argument. None: 'group' for the estimator 'group', 'none' for the others."},
    )
    use_bias_correction_kl: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "TRL's argument. None: True, but False with 'sequence_token'."},
    )
    rewards_in_flight: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of calls of reward functions, one for each group, that run at the same time. "
            "None: each function is called once for the whole batch."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds that one call of a reward function may take. None: no limit."},
    )
    generation_chunks: int = field(
        default=1,
        metadata={"help": "Number of chunks in which a batch is generated, with rewards_in_flight."},
    )
    fit_micro_batches: bool = field(
        default=True,
        metadata={
            "help": "Whether micro-batches are made of rows of similar length, and rows that can't move the policy "
            "are left out, where that is exact."
        },
    )
    share_prefixes: Literal[True, False, "always"] = field(
        default=True,
        metadata={
            "help": "Whether completions of one prompt compute it once, where that is exact and cheaper: True, False, "
            "or always (at any cost)."
        },
    )

    vllm_sync: str = field(
        default="weights",
        metadata={
            "help": "What a colocated vLLM engine gets when the policy has changed: all 'weights', as in TRL, or the "
            "LoRA 'adapter' alone."
        },
    )

    # Whether the method's trainer has a critic. `advantage_estimator="gae"` needs one, and no other estimator uses
    # one.
    _has_critic: ClassVar[bool] = False
    # Default of `updates_per_generation`
    _updates_per_generation: ClassVar[int | None] = None
    # Sizes depend on the task and the machine: `adopt` keeps them even if they have TRL's defaults
    _sizes: ClassVar[tuple[str, ...]] = ("max_completion_length", "num_generations", "steps_per_generation")

    def __post_init__(self) -> None:
        # Logged at the end, because Accelerate's logger works only once TRL's `__post_init__` has made Accelerate's
        # state
        self._notes: list[str] = []
        check_types(self)
        self._resolve_method()
        # So that [`adopt`] can tell defaults that are resolved below from values that the user set
        self._left_open = {f.name for f in fields(self) if f.default is None and getattr(self, f.name) is None}
        self._check_axes()
        inherited: dict[str, Any] = {f.name: f.default for f in fields(trl.GRPOConfig)}
        if self.epsilon is None and TRUST_REGIONS[self.trust_region].divergence is None:
            self.epsilon = inherited["epsilon"]
        if self.scale_rewards is None:
            self.scale_rewards = ESTIMATORS[self.advantage_estimator].scale_rewards
        check_ratios(self)
        if self.use_bias_correction_kl is None:
            self.use_bias_correction_kl = self.importance_sampling_level != "sequence_token"
        self._check_overlong()
        self._check_rewards_ahead()
        check_generation(self)
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
        check_group_sizes(self)
        note_idle_region(self)
        check_sampling(self)
        for note in self._notes:
            logger.warning(note)

    def _resolve_method(self) -> None:
        """A method converts, resolves and refuses its own arguments here, before all others are checked."""

    @contextmanager
    def _shown_to_trl(self) -> Iterator[None]:
        """A method can set arguments here to the values that TRL has to see when it checks them."""
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
            ("prompt_features", PROMPT_FEATURES),
            ("refill_value", VALUES),
            ("advantage_estimator", critics if self._has_critic else [n for n in ESTIMATORS if n not in critics]),
            ("importance_sampling_level", IMPORTANCE_LEVELS),
            ("trust_region", TRUST_REGIONS),
            ("token_normalization", TOKEN_NORMALIZATIONS),
            ("share_prefixes", SHARING),
            ("vllm_sync", VLLM_SYNCS),
        ):
            value = getattr(self, name)
            if value is None and name in self._left_open:
                continue
            require_one_of(name, value, known)
        require(
            self.share_prefixes != "always" or self.fit_micro_batches,
            "share_prefixes='always' has no effect with fit_micro_batches=False. Leave one of them out.",
        )
        self._check_estimator()
        check_refilling(self)
        check_engine(self)

    def _check_estimator(self) -> None:
        estimator = ESTIMATORS[self.advantage_estimator]
        momentum = self.reinforce_baseline_momentum
        if momentum is not None:
            require(
                "baseline" in estimator.needs,
                f"reinforce_baseline_momentum={momentum} has no effect with advantage_estimator="
                f"{self.advantage_estimator!r}. Set advantage_estimator='reinforce', or leave "
                "reinforce_baseline_momentum out.",
            )
            require(
                0 <= momentum < 1, f"reinforce_baseline_momentum={momentum} must lie in [0, 1). A usual value is 0.9."
            )
        scale = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)  # as TRL reads it
        require(
            scale not in estimator.refused_scales,
            f"scale_rewards={self.scale_rewards!r} makes no sense with advantage_estimator="
            f"{self.advantage_estimator!r}: {estimator.refused_scales.get(str(scale))}. Set scale_rewards to "
            f"{' or '.join(repr(name) for name in SCALES if name not in estimator.refused_scales)}.",
        )
        require(
            estimator.takes_negative or self.multi_objective_aggregation != "normalize_then_sum",
            "multi_objective_aggregation='normalize_then_sum' makes rewards negative, and advantage_estimator="
            f"{self.advantage_estimator!r} divides by their mean. Set 'sum_then_normalize'.",
        )

    def _check_overlong(self) -> None:
        if self.soft_punish_cache is None:
            # The proportion of the DAPO paper, 4,096 of 20,480
            self.soft_punish_cache = (self.max_completion_length or 0) // 5
        require(
            0 <= self.soft_punish_cache <= (self.max_completion_length or math.inf),
            f"soft_punish_cache={self.soft_punish_cache} must lie between 0 (no punishment) and "
            f"max_completion_length={self.max_completion_length}.",
        )
        require(
            ESTIMATORS[self.advantage_estimator].takes_negative or not self.soft_punish_cache,
            f"soft_punish_cache={self.soft_punish_cache} adds a negative reward, and advantage_estimator="
            f"{self.advantage_estimator!r} divides by the mean reward. Set soft_punish_cache=0; to leave overlong "
            "completions out instead, set mask_truncated_completions=True.",
        )

    def _check_rewards_ahead(self) -> None:
        require(
            self.generation_chunks == 1 or self.rewards_in_flight is not None,
            f"generation_chunks={self.generation_chunks} has no effect without rewards_in_flight: TRL calls each "
            "reward function once, after generation. Set rewards_in_flight to the number of calls that may run at the "
            "same time, or leave generation_chunks out.",
        )
        require(
            self.rewards_in_flight is None or self.rewards_in_flight >= 1,
            f"rewards_in_flight={self.rewards_in_flight} must be at least 1, or None to compute rewards after "
            "generation.",
        )
        require(
            self.reward_timeout is None or self.reward_timeout > 0,
            f"reward_timeout={self.reward_timeout} must be a positive number of seconds, or None for no limit.",
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
            f"steps_per_generation={self.steps_per_generation} is not a multiple of gradient_accumulation_steps="
            f"{self.gradient_accumulation_steps}. Change one of them, or set token_normalization='generation_batch'.",
        )

    def to_dict(self) -> dict[str, Any]:
        """What is written into logs: without access tokens."""
        settings: dict[str, Any] = hidden_tokens(super().to_dict())
        return settings

    @property
    def is_neutral(self) -> bool:
        """Whether every axis has TRL's value, so that the same rollouts give TRL's gradient."""
        return (
            self.rollout_selection == "all"
            and self.advantage_estimator == "group"
            and IMPORTANCE_LEVELS[self.importance_sampling_level].old_logps is None
            and TRUST_REGIONS[self.trust_region].divergence is None
            and self.token_normalization == "generation_batch"
        )

    @classmethod
    def adopt(cls, args: trl.GRPOConfig) -> Self:
        """
        Take over a configuration that was written for TRL. Values that were set are kept, and so are all sizes.
        Arguments that have TRL's default get the default of this class; a warning lists those that differ, because
        nobody can tell whether they were written down on purpose.

        Args:
            args ([`~trl.GRPOConfig`]):
                The configuration. If it is already of this class, it is returned as it is.

        Raises:
            TypeError: if it is not a configuration for GRPO, or is one of a different method of `trl_ext`.
        """
        # What all methods have in common can become each of them; PPO's arguments don't become VAPO's
        if isinstance(args, GRPOConfig) and type(args) is not GRPOConfig and not isinstance(args, cls):
            raise TypeError(
                f"`args` is a {type(args).__name__}, whose defaults are those of a different method. Pass a "
                f"{cls.__name__}."
            )
        result = adopted(cls, args, trl.GRPOConfig, cls._taken)
        names = sorted(cls._differing(args))
        before, after = (_shown({name: getattr(config, name) for name in names}) for config in (args, result))
        changed = [f"{name}={after[name]} (was {before[name]})" for name in after if after[name] != before[name]]
        if changed and result is not args:
            logger.warning(
                f"{cls.__name__}'s defaults replace those of `args`, a {type(args).__name__}: {', '.join(changed)}. "
                f"To set one of these, pass a {cls.__name__}."
            )
        return result

    @classmethod
    def _differing(cls, args: trl.GRPOConfig) -> set[str]:
        """Arguments of `args` whose default is a different one in this class."""
        parents = {f.name: f.default for f in fields(GRPOConfig if isinstance(args, GRPOConfig) else trl.GRPOConfig)}
        return {f.name for f in fields(cls) if f.init and f.name in parents and f.default != parents[f.name]}

    @classmethod
    def _taken(cls, args: trl.GRPOConfig) -> dict[str, Any]:
        """The arguments that [`adopt`] takes over: what the user set, as far as that can be told, and all sizes."""
        parents = {f.name: f for f in fields(GRPOConfig if isinstance(args, GRPOConfig) else trl.GRPOConfig)}
        names = {f.name for f in fields(cls) if f.init} & parents.keys()
        changed = cls._differing(args)
        left_open: set[str] = getattr(args, "_left_open", set()) - set(cls._sizes)
        taken = {
            name: getattr(args, name)
            for name in names - left_open
            if name not in changed or name in cls._sizes or getattr(args, name) != parents[name].default
        }
        # Of these sizes one was set, and the others were computed from it
        taken.pop("generation_batch_size", None)
        if taken.get("updates_per_generation") is not None:
            taken.pop("steps_per_generation")
        return taken
