"""
The engine: TRL's GRPO with three axes that combine freely.

| axis | values |
|---|---|
| `rollout_selection` | `all` · `refill` (DAPO) · `duplicate` (DUPO) |
| `advantage_estimator` | `group` (GRPO) · `leave_one_out` (RLOO) · `reinforce` |
| `importance_sampling_level` | `token` · `sequence` (GSPO) · `sequence_token` (GSPO-token) |

With `all`, `group` and `token` (or `sequence`) it is `trl.GRPOTrainer`: its gradient, for a fraction of the compute,
and with `fit_micro_batches=False` every number of it.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import get_callable_name, get_config_model_id

from ..errors import require, require_one_of
from ..objectives.advantages import aggregate_rewards, leave_one_out, reinforce, scale_advantages, updated_baseline
from ..objectives.ratios import sequence_token_old_logps
from ..rewards.guard import RewardFunctionError
from ..rollouts.micro_batches import FIT, Saved, fit_window, fitted_pass
from ..rollouts.outlook import AdaptiveOutlook
from ..rollouts.rollout import ScoredGroups, ScoredRound
from ..rollouts.selection import AcceptanceRate, GroupSelection, census, has_variance, outcome_rewards
from ..rollouts.statistics import restate_loss_metrics
from ..rollouts.stream import PromptStream, can_be_read_twice, prompt_key
from .cards import name_what_has_no_hub_id
from .seams.grpo import GRPOSeams, Rows, savings_of


logger = get_logger(__name__)

ROLLOUT_SELECTIONS = ("all", "refill", "duplicate")
REFILL_DRAWS = ("blind", "informed")
ADVANTAGE_ESTIMATORS = ("group", "leave_one_out", "reinforce")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
TOKEN_NORMALIZATIONS = ("generation_batch", "mini_batch")

# Losses that clip the ratio to 1 ± epsilon, and losses normalised by a count of tokens
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
TOKEN_COUNT_LOSSES = ("dapo", "cispo", "vespo")
# A sequence ratio is a geometric mean over tokens: it moves by 1e-4 to 1e-3 where a token ratio moves by 1e-1. Clip
# ranges in use lie well inside these borders (token 0.1–0.3, sequence 2e-4–3e-3).
SMALLEST_TOKEN_EPSILON = 0.005
LARGEST_SEQUENCE_EPSILON = 0.05

# Prompts that an informed draw chooses from, for each that it draws
LOOKAHEAD = 8

SHAPING_REWARD = "soft_overlong_punishment_reward"


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

    _estimators: ClassVar[tuple[str, ...]] = ADVANTAGE_ESTIMATORS
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
            self.scale_rewards = inherited["scale_rewards"] if self.advantage_estimator == "group" else "none"
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
        require(
            self.advantage_estimator != "gae" or "gae" in self._estimators,
            "advantage_estimator='gae' needs a critic. Use PPOConfig and PPOTrainer.",
        )
        for name, known in (
            ("rollout_selection", ROLLOUT_SELECTIONS),
            ("refill_draws", REFILL_DRAWS),
            ("advantage_estimator", self._estimators),
            ("importance_sampling_level", IMPORTANCE_SAMPLING_LEVELS),
            ("token_normalization", TOKEN_NORMALIZATIONS),
        ):
            value = getattr(self, name)
            if value is None and name in self._left_open:
                continue
            require_one_of(name, value, known)
        momentum = self.reinforce_baseline_momentum
        if momentum is not None:
            require(
                self.advantage_estimator == "reinforce",
                f"reinforce_baseline_momentum={momentum} has no effect with advantage_estimator="
                f"{self.advantage_estimator!r}. Set advantage_estimator='reinforce', or leave it out.",
            )
            require(
                0 <= momentum < 1, f"reinforce_baseline_momentum={momentum} must lie in [0, 1); 0.9 is a usual value."
            )
        require(
            self.advantage_estimator != "reinforce" or self.scale_rewards not in ("group", "True", True),
            "scale_rewards='group' with advantage_estimator='reinforce' divides by the deviation within a group, "
            "which is zero where all of its rewards are equal. Set scale_rewards='none' or 'batch'.",
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
        if self.importance_sampling_level == "token":
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


@dataclass
class Counters:
    """
    Totals of a run over all processes.

    Args:
        generated_tokens (`int`):
            Completion tokens that the policy wrote for training, discarded ones included.
        trained_tokens (`int`):
            Completion tokens that entered a loss, copies included, counted once per generation.
        generation_rounds (`int`):
            Rounds of generation. Optimizer steps are `trainer.state.global_step`.
        batches_without_variance (`int`):
            Generation batches in which no group had variance.
    """

    generated_tokens: int = 0
    trained_tokens: int = 0
    generation_rounds: int = 0
    batches_without_variance: int = 0


def _model_name(model: Any) -> str:
    """The last part of a model's Hub id or path, as TRL names things by it."""
    identifier = model if isinstance(model, str) else get_config_model_id(model.config)
    return identifier.split("/")[-1]


def _reward_name(func: Any) -> str:
    """The name TRL will give a reward function; known before anything is loaded."""
    return _model_name(func) if isinstance(func, str | nn.Module) else get_callable_name(func)


class GRPOTrainer(GRPOSeams):
    """
    [`~trl.GRPOTrainer`] with the axes of [`GRPOConfig`]. Takes the same arguments; `args` may be a
    [`~trl.GRPOConfig`], which [`GRPOConfig.adopt`] takes over.

    Args:
        curriculum ([`~trl_ext.curriculum.schedule.DifficultyCurriculum`], *optional*):
            Which prompts are trained on when. `None`: TRL's order.

    Raises:
        ValueError: before a model is loaded, for a data set without prompts, with fewer prompts than one generation
            batch, or that `rollout_selection="refill"` can't draw from; for unknown names in `outcome_reward_funcs`.
        RewardFunctionError: in training, if a reward function fails. What was trained is saved first.
    """

    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    args: GRPOConfig
    _tag_names = ["trl", "trl_ext", "grpo"]

    def __init__(self, *args: Any, curriculum: Any = None, **kwargs: Any) -> None:
        given = inspect.signature(trl.GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        given.pop("self")
        if given.get("args") is None:
            given["args"] = self.config_class(f"{_model_name(given['model'])}-{self._name}")
        config = given["args"] = self.config_class.adopt(given["args"])
        self._check_data(config, given.get("train_dataset"), given.get("environment_factory"))
        self._check_images(config, given.get("train_dataset"), given.get("rollout_func"))
        self._check_curriculum(config, curriculum, given)
        self.curriculum = curriculum
        require(
            config.generation_chunks == 1 or not (given.get("tools") or given.get("environment_factory")),
            f"generation_chunks={config.generation_chunks} with tools or environments: TRL binds them to the rows of "
            "the whole batch. Leave it at 1; rewards_in_flight alone scores their groups side by side.",
        )
        funcs = given.get("reward_funcs")
        given["reward_funcs"] = [] if funcs is None else list(funcs) if isinstance(funcs, list) else [funcs]
        self._add_overlong_punishment(given)
        if given.get("environment_factory") is None:
            self._check_outcome_names(config, [_reward_name(func) for func in given["reward_funcs"]])
        self.selects = config.rollout_selection != "all"
        self.card_sections: list[Callable[[], str]] = []
        self.counters = Counters()
        self._acceptance = AcceptanceRate()
        self._baseline: float | None = None
        self._duplicates = torch.Generator().manual_seed(config.seed)
        super().__init__(**given)
        self._check_outcome_names(config, self.reward_func_names)  # with those of environments
        if config.importance_sampling_level == "sequence_token":
            # TRL's loss runs at token level, on old log-probabilities that make its ratio the sequence's
            self.importance_sampling_level = "token"
        self._set_up_selection(config)
        self._set_up_roles(config)
        self._set_up_micro_batches(config)

    def _set_up_roles(self, config: GRPOConfig) -> None:
        """Models beside the policy and TRL's own reference and rewards."""

    def _set_up_selection(self, config: GRPOConfig) -> None:
        outcome = config.outcome_reward_funcs or [n for n in self.reward_func_names if n != SHAPING_REWARD]
        self.is_outcome = torch.tensor([name in outcome for name in self.reward_func_names])
        if config.rollout_selection == "refill" or self.curriculum is not None:
            self._refill_stream = PromptStream(self.rows_seen_in_training(), seed=config.seed)
        self._groups: Rows = []  # rows of all ranks that are generated for, one a group; known to informed draws
        self._replaced = 0
        self._outlook = self._new_outlook(config) if config.refill_draws == "informed" else None

    def _set_up_micro_batches(self, config: GRPOConfig) -> None:
        self.saved = Saved()
        exact = savings_of(self)
        # Where refilling falls back on copies they are computed: metrics over all rows are worth more there
        self.savings = replace(exact, weigh_copies=exact.skip_dead and config.rollout_selection == "duplicate")
        if config.fit_micro_batches:
            for reason in self.savings.reasons:
                logger.warning(
                    f"Not all compute that TRL spends on padding and dead rows can be saved here: {reason}."
                )

    # What is refused before a model is loaded

    @staticmethod
    def _check_data(config: GRPOConfig, dataset: Any, environment_factory: Any) -> None:
        columns = getattr(dataset, "column_names", None)
        if columns is None and isinstance(dataset, IterableDataset):
            columns = list(next(iter(dataset), {})) or None  # not declared: its first row tells
        refills = config.rollout_selection == "refill"
        for column in config.similar_prompts_columns or []:
            require(
                columns is None or column in columns,
                f"similar_prompts_columns names {column!r}, but train_dataset has only {columns}.",
            )
            require(
                not config.remove_unused_columns,
                f"similar_prompts_columns={config.similar_prompts_columns} are dropped by remove_unused_columns=True. "
                "Set remove_unused_columns=False.",
            )
        if environment_factory is None:
            require(dataset is not None, "train_dataset=None: pass a data set with a `prompt` column.")
            require(
                columns is None or "prompt" in columns,
                f"train_dataset has no column `prompt`, only {columns}. Rename the column that holds the prompts.",
            )
        elif refills:
            require(
                dataset is not None and (columns is None or "prompt" in columns),
                "rollout_selection='refill' draws new prompts from train_dataset, but here the environment owns the "
                "data. Set rollout_selection='duplicate' (DUPO), or pass a data set with a `prompt` column.",
            )
        if isinstance(dataset, Dataset):
            assert config.generation_batch_size and config.num_generations  # TRL has set and checked both
            prompts = config.generation_batch_size // config.num_generations
            require(
                len(dataset) >= prompts,
                f"train_dataset has {len(dataset)} prompts, fewer than the {prompts} of one generation batch "
                f"(generation_batch_size={config.generation_batch_size} / num_generations={config.num_generations}). "
                "Lower per_device_train_batch_size, gradient_accumulation_steps or updates_per_generation.",
            )
        elif isinstance(dataset, IterableDataset) and refills:
            require(
                can_be_read_twice(dataset),
                "rollout_selection='refill' reads train_dataset beside the training loop, but this iterable data set "
                "can't be read twice (a second pass doesn't start where the first did). Build it from a function that "
                "opens the source anew, or set rollout_selection='duplicate'.",
            )

    @staticmethod
    def _check_curriculum(config: GRPOConfig, curriculum: Any, given: dict[str, Any]) -> None:
        if curriculum is None:
            return
        dataset: Any = given.get("train_dataset")
        if isinstance(curriculum, str | type):
            raise TypeError(f"curriculum={curriculum!r} is no object. Pass a DifficultyCurriculum(...).")
        column = curriculum.column
        require(
            isinstance(dataset, Dataset) and given.get("environment_factory") is None,
            "curriculum chooses among the rows of train_dataset, which must be a datasets.Dataset: not streamed, not "
            "an environment's. Load it without streaming, or leave curriculum out.",
        )
        require(
            config.refill_draws != "informed",
            "curriculum and refill_draws='informed' both choose the prompts. Leave one of them out.",
        )
        if column is not None:
            require(
                column in dataset.column_names,
                f"The curriculum's column {column!r} is missing: train_dataset has only {dataset.column_names}.",
            )
            require(
                not config.remove_unused_columns,
                f"The curriculum's column {column!r} is dropped by remove_unused_columns=True. Set it to False.",
            )
            curriculum.fit(dataset[column])
        require(
            curriculum.start_completion_length is None or not given.get("tools"),
            "start_completion_length with tools: TRL counts a tool's tokens by max_completion_length. Leave it out.",
        )

    @staticmethod
    def _check_images(config: GRPOConfig, dataset: Any, rollout_func: Any) -> None:
        columns = getattr(dataset, "column_names", None) or []
        require(
            config.rollout_selection == "all" or rollout_func is None or not {"image", "images"} & set(columns),
            f"rollout_selection={config.rollout_selection!r} can't tell whose image is whose when a rollout_func "
            "generates. Set rollout_selection='all', or generate without rollout_func.",
        )

    @staticmethod
    def _check_outcome_names(config: GRPOConfig, names: list[str]) -> None:
        for name in config.outcome_reward_funcs or []:
            require(
                name in names, f"outcome_reward_funcs names {name!r}, but the reward functions are {', '.join(names)}."
            )

    @staticmethod
    def _add_overlong_punishment(given: dict[str, Any]) -> None:
        """Append TRL's soft punishment to the reward functions, unless the user passes one."""
        config, funcs = given["args"], given["reward_funcs"]
        rewarded = funcs or given.get("environment_factory") is not None
        if not config.soft_punish_cache or not rewarded or SHAPING_REWARD in map(_reward_name, funcs):
            return
        funcs.append(get_soft_overlong_punishment(config.max_completion_length, config.soft_punish_cache))
        if config.reward_weights is not None:
            given["args"] = copy.copy(config)
            given["args"].reward_weights = [*config.reward_weights, 1.0]
        classes = given.get("reward_processing_classes")
        if classes is not None:
            given["reward_processing_classes"] = [*(classes if isinstance(classes, list) else [classes]), None]

    # Prompts

    def _new_outlook(self, config: GRPOConfig) -> AdaptiveOutlook:
        columns, dataset = config.similar_prompts_columns or [], self._refill_stream.dataset
        outlook = AdaptiveOutlook(
            columns, self.num_generations, config.success_threshold, config.seed, exploration=config.refill_exploration
        )
        if isinstance(dataset, Dataset):
            outlook.fit_bins({column: dataset[column] for column in columns})
        return outlook

    def _first_of_groups(self, rows: Rows) -> Rows:
        """The rows of all ranks, one for each group, from this rank's."""
        start = self.accelerator.process_index * len(rows)
        gathered: Rows = gather_object(rows[-start % self.num_generations :: self.num_generations])
        return gathered

    @property
    def _progress(self) -> float:
        """Share of the run that is over."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def completion_length(self) -> int | None:
        if self.curriculum is None or self.curriculum.start_completion_length is None:
            return None
        length: int = self.curriculum.completion_length(self.max_completion_length, self._progress)
        self.train_metrics["curriculum/completion_length"].append(length)
        return length

    def rows_to_generate(self, rows: Rows) -> Rows:
        """
        Informed draws: dealt prompts whose groups will hardly be live make room for others, by slot. A curriculum:
        those that it doesn't choose.
        """
        if self._outlook is None and self.curriculum is None:
            return rows
        dealt = self._first_of_groups(rows)
        lookahead = LOOKAHEAD if self._outlook is not None else self.curriculum.lookahead
        others = self._refill_stream.draw((lookahead - 1) * len(dealt), exclude=set(map(prompt_key, dealt)))
        if self._outlook is not None:
            self._outlook.tick()
            chosen = self._outlook.choose(dealt + others, len(dealt), reserved=len(dealt))
        else:
            chosen = self.curriculum.choose(dealt + others, len(dealt), self._progress)
        stays, comes = set(chosen), iter([others[i - len(dealt)] for i in chosen if i >= len(dealt)])
        groups = [row if i in stays else next(comes) for i, row in enumerate(dealt)]
        self._groups = groups
        self._replaced = sum(i not in stays for i in range(len(dealt)))
        return self._local_rows(groups, self.num_generations)

    def _observe(self, rows: Rows, outcomes: torch.Tensor, live: list[bool]) -> None:
        """Every group that was generated: how many prompts are live, and which."""
        self._acceptance.observe(sum(live), len(live))
        if self._outlook is not None:
            self._outlook.observe(rows, outcomes.cpu(), live)
        self._learn_difficulty(rows, outcomes)

    def _learn_difficulty(self, rows: Rows, outcomes: torch.Tensor) -> None:
        if self.curriculum is not None:
            solved = (outcomes >= self.args.success_threshold).float().masked_fill(outcomes.isnan(), torch.nan)
            self.curriculum.observe(rows, solved.cpu())

    # Selection

    def group_outcomes(self, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        """
        Outcome rewards by group.

        Args:
            rewards (`torch.Tensor` of shape `(N, F)`):
                Rewards by function, NaN = not applicable.
            num_generations (`int`):
                Size of a group.

        Returns:
            `torch.Tensor` of shape `(N / num_generations, num_generations)`.
        """
        return outcome_rewards(rewards, self.reward_weights, self.is_outcome).view(-1, num_generations)

    def select_groups(self, first: ScoredRound) -> GroupSelection:
        outcomes = self.group_outcomes(first.rewards, self.num_generations)
        live = has_variance(outcomes).tolist()
        selection = GroupSelection(live, self.num_generations, rows_per_rank=len(first.rollouts))
        self._observe(self._groups, outcomes, live)
        if self.args.rollout_selection == "refill":
            self._refill(first, selection)
        if not any(selection.live):
            self._warn_without_variance()
        selection.duplicate(self._duplicates)
        return selection

    def _refill(self, first: ScoredRound, selection: GroupSelection) -> None:
        """Generate for new prompts until every slot holds a live group, the rounds are used up, or the prompts are."""
        processes, size = self.accelerator.num_processes, self.num_generations
        together = processes // math.gcd(processes, size)  # prompts that give every rank equally many rows
        drawn: set[str] | None = None
        for _ in range(self.args.max_refill_rounds):
            missing = len(selection.dead_slots)
            if not missing:
                return
            if drawn is None:
                drawn = set(gather_object([prompt_key(rollout.row) for rollout in first.rollouts]))
            count = self._acceptance.draws_for(missing, at_most=len(selection.slots), multiple_of=together)
            choose, lookahead = None, LOOKAHEAD
            if self._outlook is not None:
                choose = partial(self._outlook.choose, count=count)
            elif self.curriculum is not None:
                choose = partial(self.curriculum.choose, count=count, progress=self._progress)
                lookahead = self.curriculum.lookahead
            rows = self._refill_stream.draw(count, drawn, choose, lookahead)
            rows = rows[: len(rows) // together * together]
            if not rows:
                return
            scored = self.score_round(self._local_rows(rows, size))
            self._rounds.append(scored)
            outcomes = self.group_outcomes(scored.rewards, size)
            live = has_variance(outcomes).tolist()
            self._observe(rows, outcomes, live)
            selection.fill(len(self._rounds) - 1, live, rows_per_rank=len(scored.rollouts))

    def _local_rows(self, rows: Rows, num_generations: int) -> Rows:
        """This rank's part of `rows`, each repeated for its completions; copies, since rollouts write into them."""
        repeated = [row for row in rows for _ in range(num_generations)]
        per_rank = len(repeated) // self.accelerator.num_processes
        start = self.accelerator.process_index * per_rank
        return [copy.deepcopy(row) for row in repeated[start : start + per_rank]]

    def _warn_without_variance(self) -> None:
        self.counters.batches_without_variance += 1
        times = self.counters.batches_without_variance
        if times & (times - 1) == 0:  # the 1st, 2nd, 4th, 8th, …
            logger.warning(
                f"No group of this generation batch has reward variance after {len(self._rounds)} "
                f"round(s) of generation ({times} such batch(es) so far). The step goes on as TRL's would. Are "
                "the prompts all solved or all out of reach, or does the reward not tell completions apart?"
            )

    # Advantages and ratios

    def estimate_advantages(self, rewards: torch.Tensor, training: bool) -> torch.Tensor | None:
        estimator = self.args.advantage_estimator
        if estimator == "group":
            return None
        num_generations = self.num_generations if training else self.num_generations_eval
        reward = aggregate_rewards(rewards, self.reward_weights, self.multi_objective_aggregation, num_generations)
        if estimator == "leave_one_out":
            advantages = leave_one_out(reward, num_generations)
        else:
            advantages = reinforce(reward, self._baseline)
            momentum = self.args.reinforce_baseline_momentum
            if momentum is not None and training:
                self._baseline = updated_baseline(self._baseline, reward, momentum)
        return scale_advantages(advantages, reward, self.scale_rewards, num_generations)

    def old_logps_for_loss(
        self, per_token_logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor
    ) -> torch.Tensor | None:
        if self.args.importance_sampling_level != "sequence_token":
            return None
        old = inputs.get("old_per_token_logps")
        # TRL leaves them out where the policy that sampled is the policy that learns
        return sequence_token_old_logps(per_token_logps, per_token_logps.detach() if old is None else old, mask)

    # Micro-batches

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        if self.args.token_normalization == "mini_batch":
            self._normalize_by_mini_batch(micro_batches)
        if self.args.fit_micro_batches:
            saved = Saved()
            micro_batches[:] = self.fit(micro_batches, self.windows_of_buffer(), saved)
            self.train_metrics["compute/saved"].append(saved.share)
            self.saved += saved

    def _normalize_by_mini_batch(self, micro_batches: list[dict[str, Any]]) -> None:
        window = self.args.gradient_accumulation_steps
        tokens = torch.stack([(b["completion_mask"] * b.get("tool_mask", 1)).sum() for b in micro_batches])
        tokens = self.accelerator.reduce(tokens.view(-1, window).sum(dim=1), reduction="sum")
        for i, batch in enumerate(micro_batches):
            # TRL's loss scales the count of a generation batch down to a step: this is that step's, scaled up
            batch["num_items_in_batch"] = tokens[i // window] * (len(micro_batches) / window)

    def fit(
        self, micro_batches: list[dict[str, Any]], windows: list[tuple[int, int]], saved: Saved
    ) -> list[dict[str, Any]]:
        """
        Deal TRL's micro-batches anew. Every process must make the call.

        Args:
            micro_batches (`list[dict]`):
                As TRL dealt them; left as they are.
            windows (`list[tuple[int, int]]`):
                Stretches of them that share an optimizer step.
            saved ([`Saved`]):
                Counts what that saves.

        Returns:
            `list[dict]`: equally many.
        """
        fitted: list[dict[str, Any]] = []
        for start, stop in windows:
            window, multiple = micro_batches[start:stop], self.columns_multiple
            fitted += fit_window(window, self.savings, self.accelerator, self.loss_type, multiple, saved)
        return fitted

    @property
    def columns_multiple(self) -> int:
        """TRL's `pad_to_multiple_of`, resolved."""
        return int(self.pad_to_multiple_of or 1)

    def pass_without_loss(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.args.fit_micro_batches:
            return forward(*args, **kwargs)
        return fitted_pass(forward, self.savings.trim_prompts, self.columns_multiple, *args, **kwargs)

    def restate_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        fit = inputs.get(FIT)
        if fit is None:
            return loss
        restate_loss_metrics(
            self.train_metrics,
            fit,
            by_row=self.importance_sampling_level == "sequence",
            savings=self.savings,
        )
        return loss * fit.scale

    # Metrics, checkpoints

    def on_rollouts(self, output: dict[str, Any], selection: GroupSelection | None, rounds: list[ScoredRound]) -> None:
        metrics, counters = self.train_metrics, self.counters
        if self.curriculum is not None:
            difficulties = [self.curriculum.difficulty(row) for row in self._groups]
            metrics["curriculum/difficulty"].append(sum(difficulties) / len(difficulties))
            metrics["curriculum/prompts_replaced"].append(self._replaced)
            if selection is None:
                assert self._base_rewards is not None
                self._learn_difficulty(self._groups, self.group_outcomes(self._base_rewards, self.num_generations))
        per_batch = len(output["advantages"]) * self.accelerator.num_processes
        completions = sum(len(scored.rewards) for scored in rounds) or per_batch
        counters.generated_tokens += round(metrics["completions/mean_length"][-1] * completions)
        counters.trained_tokens += int(output["num_items_in_batch"])
        counters.generation_rounds += len(rounds) or 1
        if self.args.is_neutral:
            return
        for name, total in asdict(counters).items():
            metrics[f"selection/{name}"] = [total]
        if selection is None:
            return
        rewards = torch.cat([scored.rewards for scored in rounds])
        counts = census(self.group_outcomes(rewards, self.num_generations), self.args.success_threshold)
        counts["kept"] = sum(selection.live)
        counts["surplus"] = selection.surplus
        counts["duplicated"] = sum(source != slot for slot, source in enumerate(selection.sources))
        for name, value in counts.items():
            metrics[f"selection/groups_{name}"].append(value)
        metrics["selection/rounds"].append(len(rounds))
        metrics["selection/acceptance"].append(self._acceptance.rate)
        if self._outlook is not None:
            metrics["selection/prompts_replaced"].append(self._replaced)

    def run_state(self) -> dict[str, Any]:
        state = {
            "counters": asdict(self.counters),
            "saved": asdict(self.saved),
            "acceptance": asdict(self._acceptance),
            "baseline": self._baseline,
            "duplicates": self._duplicates.get_state(),
        }
        if self.args.rollout_selection == "refill" or self.curriculum is not None:
            state["refill_stream"] = self._refill_stream.state_dict()
        if self.curriculum is not None:
            state["curriculum"] = self.curriculum.state_dict()
        if self._outlook is not None:
            state["outlook"] = self._outlook.state_dict()
        return state

    def load_run_state(self, state: dict[str, Any]) -> None:
        self.counters = Counters(**state["counters"])
        self.saved = Saved(**state["saved"])
        self._acceptance = AcceptanceRate(**state["acceptance"])
        self._baseline = state["baseline"]
        self._duplicates.set_state(state["duplicates"].cpu())
        if (self.args.rollout_selection == "refill" or self.curriculum is not None) and "refill_stream" in state:
            self._refill_stream.load_state_dict(state["refill_stream"])
        if self.curriculum is not None and "curriculum" in state:
            self.curriculum.load_state_dict(state["curriculum"])
        if self._outlook is not None and "outlook" in state:
            self._outlook.load_state_dict(state["outlook"])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, followed by what `self.card_sections` return (Markdown)."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        card = Path(str(self.args.output_dir)) / "README.md"
        text = name_what_has_no_hub_id(card.read_text(encoding="utf-8"), card.parent.name)
        sections = [section() for section in self.card_sections]
        card.write_text("\n\n".join([text.rstrip(), *sections]) + "\n", encoding="utf-8")

    # Rollouts without training

    def roll_out(self, rows: Rows, num_generations: int, seed: int | None = None) -> ScoredGroups:
        """
        Generate and score completions without training on them. Leaves random states and metrics as they were.

        Args:
            rows (`list[dict]`):
                Data set rows; the same on every rank.
            num_generations (`int`):
                Completions for each.
            seed (`int`, *optional*):
                Seed of the sampling.

        Returns:
            [`~trl_ext.rollouts.rollout.ScoredGroups`]
        """
        processes = self.accelerator.num_processes
        together = processes // math.gcd(processes, num_generations)
        padded = rows + rows[:1] * (-len(rows) % together)
        try:
            with self._apart_from_training(num_generations, seed):
                scored = self.score_round(self._local_rows(padded, num_generations))
        except RewardFunctionError as error:  # on every rank
            self.save_before_stopping(error)
            raise
        tokens = sum(sum(r.tool_mask) if r.tool_mask else len(r.completion_ids) for r in scored.rollouts)
        rewards = scored.rewards[: len(rows) * num_generations].view(len(rows), num_generations, -1)
        total = self.accelerator.reduce(torch.tensor(tokens, device=self.accelerator.device), reduction="sum")
        return ScoredGroups(rewards, self.reward_func_names, int(total), scored.rollouts)
