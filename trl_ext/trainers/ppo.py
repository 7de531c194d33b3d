"""
Proximal Policy Optimization (https://huggingface.co/papers/1707.06347) with a critic, in its language-model form
(https://huggingface.co/papers/1909.08593, https://huggingface.co/papers/2203.02155).

Against GRPO, the advantage of a token is what generalised advantage estimation makes of rewards and of a critic's
values, so that a group of one is enough, and a reward can arrive at any token. The KL to the reference is a reward. On
the same rollouts: clipped surrogate (eq. 7, TRL's own), plus `vf_coef` times the value loss (eq. 9), minus
`entropy_coef` times the entropy.

The critic is part of the policy's engine ([`~trl_ext.roles.critic`]); its values come out of the forwards that compute
log-probabilities anyway.
"""

import copy
import inspect
import math
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
import trl
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)

from ..errors import require, require_one_of
from ..objectives.advantages import aggregate_rewards
from ..objectives.gae import carried_back, gae, length_adaptive_lam
from ..objectives.kl import KL_ESTIMATORS, KL_RULES, adapted_kl_coef, kl_estimate
from ..objectives.values import explained_variance, value_loss, whiten
from ..rewards.models import RewardModelOnIds
from ..rewards.scaling import REWARD_SCALINGS, RunningScale
from ..roles.critic import HEAD_KINDS, Critic, HeadCritic, ModelCritic
from ..rollouts.prompts import with_tokenized_prompts
from ..rollouts.replay import ReplayBuffer, append_rows
from ..rollouts.stream import PromptStream
from .grpo import model_name
from .grpo_config import GRPOConfig
from .seams.ppo import ActorCriticSeams


logger = get_logger(__name__)

CRITICS = ("head", "model")
CRITIC_INITS = ("policy", "reward")
# Steps in a row whose loss isn't finite, after which a run is not worth its electricity
MOST_SKIPPED_STEPS = 3

# What TRL 1.12's PPOConfig called what is an argument of TRL's own
RENAMED = {
    "num_ppo_epochs": "num_iterations",
    "response_length": "max_completion_length",
    "cliprange": "epsilon",
}
# What it had that has no place here, and why
DROPPED = {
    "local_rollout_forward_batch_size": "passes without gradient use per_device_train_batch_size",
    "num_sample_generations": "log_completions=True shows completions",
    "sft_model_path": "pass the policy as `model`",
    "reward_model_path": "pass the reward model as `reward_model` or in `reward_funcs`",
    "model_adapter_name": "the trained adapter is `default`",
    "ref_adapter_name": "the reference of an adapter is the adapter as it was loaded, or the base model",
    "dataset_num_proc": "the data set is tokenised while training",
}


class NonFiniteLossError(RuntimeError):
    """The loss was not finite for several optimizer steps in a row."""


@dataclass
class PPOConfig(GRPOConfig):
    """
    [`GRPOConfig`] with PPO's defaults (those of TRL 1.12's trainer unless said otherwise): generalised advantages, one
    completion per prompt, four epochs on each generation batch, clip range 0.2, learning rate 3e-6, KL to the
    reference in the reward. `loss_type`, `epsilon`, `entropy_coef`, `importance_sampling_level` and everything else of
    TRL's keep their meaning.

    Args:
        critic (`str`, *optional*, defaults to `"head"`):
            Where values come from. `"head"`: a head on the policy's last hidden state. `"model"`: a model of its own.
        critic_head (`str`, *optional*):
            Of `critic="head"`: `"linear"` or `"mlp"`. `None`: `"linear"`.
        critic_trunk_grad (`float`, *optional*):
            Of `critic="head"`: share of the value gradient, in [0, 1], that reaches the policy's trunk. `None`: 0.
        critic_init (`str`, *optional*):
            Of `critic="model"` without a `value_model`: a copy of the `"policy"` or of the `"reward"` model. `None`:
            the policy.
        critic_learning_rate (`float`, *optional*):
            The critic's learning rate. `None`: 100 times `learning_rate` for a head, which starts at zero and reads
            features that are there; `learning_rate` for a model.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the start that move only the critic.
        value_updates_per_policy_update (`int`, *optional*, defaults to `1`):
            Of so many optimizer steps, the last also moves the policy; the others only the critic.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss c₁.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            How far a value may move from the one at rollout time. `None`: any.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount γ.
        lam (`float`, *optional*, defaults to `0.95`):
            λ of generalised advantage estimation: 0 is temporal difference, 1 Monte Carlo.
        lam_alpha (`float`, *optional*):
            α of VAPO's length-adaptive λ = 1 − 1/(α·length), which then replaces `lam` for advantages.
        critic_lam (`float`, *optional*):
            λ of the returns that the critic fits. `None`: `lam`.
        bootstrap_truncated (`bool`, *optional*, defaults to `False`):
            Whether a completion that was cut off is worth the value of its last state, rather than nothing more.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether advantages get mean 0 and variance 1, over the tokens of all processes.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Whether token rewards get variance 1; their mean stays.
        reward_scaling (`str`, *optional*, defaults to `"none"`):
            What scores are divided by: nothing, the deviation of the `"batch"`, or that of all scores so far
            (`"running"`).
        reward_clip (`float`, *optional*):
            Largest magnitude of a reward after scaling. `None`: any.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the score of completions without end-of-sequence token, after scaling and clipping.
        kl_coef (`float`, *optional*, defaults to `0.05`):
            Weight of the KL to the reference in the reward: samples of π_θ estimate KL(π_θ‖π_ref). 0: no such term.
            (TRL's `beta` puts the same divergence, by k3, into the loss.)
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            `"k1"`, `"k2"` or `"k3"`, see [`~trl_ext.objectives.kl.kl_estimate`].
        kl_rule (`str`, *optional*):
            How `kl_coef` (or `beta`, if there is none) follows `kl_target`: `"ppo"`, `"proportional"` or
            `"exponential"`, see [`~trl_ext.objectives.kl.adapted_kl_coef`]. `None`: `"proportional"` if there is a
            target, else `"fixed"`.
        kl_target (`float`, *optional*):
            Wanted KL to the reference, in nats per completion.
        kl_horizon (`float`, *optional*, defaults to `10000`):
            Completions over which `"proportional"` corrects.
        kl_rate (`float`, *optional*, defaults to `0.1`):
            Of `"exponential"`, per nat.
        old_kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of KL(π_old‖π_θ), by k3, in the loss: PPO's second variant (eq. 8). To have it instead of the clip,
            set a large `epsilon`.
        old_kl_target (`float`, *optional*):
            Wanted KL(π_old‖π_θ) in nats per token at the end of a generation batch, which `old_kl_coef` then follows
            by the rule `"ppo"`.
        positive_nll_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of completions that solve their prompt (VAPO's μ).
        ptx_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the next-token loss on `ptx_dataset` (PPO-ptx).
        ptx_batch_size (`int`, *optional*):
            Rows of `ptx_dataset` for each micro-batch of a process. `None`: `per_device_train_batch_size`.
        ptx_max_length (`int`, *optional*, defaults to `1024`):
            Tokens after which such a row is cut.
        replay_ratio (`float`, *optional*, defaults to `0.0`):
            Share of the rows of a step, in [0, 1), that come from earlier generation batches. They are added to the
            new ones, so that micro-batches grow.
        replay_capacity (`int`, *optional*, defaults to `4`):
            Generation batches that can be replayed.
        num_mini_batches (`int`, *optional*):
            TRL 1.12's: mini-batches, with an optimizer step each, into which a batch of
            `per_device_train_batch_size` × `gradient_accumulation_steps` is split.
        total_episodes (`int`, *optional*):
            TRL 1.12's: completions to train on, instead of `max_steps`.
        stop_token (`str`, *optional*), stop_token_id (`int`, *optional*):
            TRL 1.12's: `"eos"`, or a token id that ends completions.
        num_ppo_epochs, response_length, cliprange (*optional*):
            TRL 1.12's names of `num_iterations`, `max_completion_length` and `epsilon`.
        local_rollout_forward_batch_size, num_sample_generations, sft_model_path, reward_model_path (*optional*):
            TRL 1.12's, without effect: a warning says what to use.
        model_adapter_name, ref_adapter_name, dataset_num_proc (*optional*):
            The same.
    """

    advantage_estimator: str = field(default="gae", metadata={"help": "Generalised advantage estimation."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt."})
    num_iterations: int = field(default=4, metadata={"help": "Epochs on each generation batch."})
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of the policy."})
    critic: str = field(
        default="head", metadata={"help": "'head' on the policy's hidden state, or a 'model' of its own."}
    )
    critic_head: str | None = field(default=None, metadata={"help": "'linear' or 'mlp'."})
    critic_trunk_grad: float | None = field(
        default=None, metadata={"help": "Share of the value gradient that reaches the policy's trunk. None: 0."}
    )
    critic_init: str | None = field(
        default=None, metadata={"help": "What a critic model is a copy of: 'policy' or 'reward'."}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the critic."})
    critic_warmup_steps: int = field(default=0, metadata={"help": "First optimizer steps that move only the critic."})
    value_updates_per_policy_update: int = field(
        default=1, metadata={"help": "Of so many optimizer steps, only the last moves the policy, too."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "Clip range of values. None: no clipping."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    lam_alpha: float | None = field(default=None, metadata={"help": "Alpha of VAPO's length-adaptive lambda."})
    critic_lam: float | None = field(default=None, metadata={"help": "Lambda of the critic's targets. None: lam."})
    bootstrap_truncated: bool = field(
        default=False, metadata={"help": "Whether a truncated completion is worth the value of its last state."}
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Whether advantages are whitened."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Whether token rewards are scaled to variance 1."})
    reward_scaling: str = field(
        default="none", metadata={"help": "Deviation that scores are divided by: 'none', 'batch' or 'running'."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Largest magnitude of a reward."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of completions that don't end."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference in the reward."})
    kl_estimator: str = field(default="k1", metadata={"help": "'k1', 'k2' or 'k3'."})
    kl_rule: str | None = field(
        default=None,
        metadata={"help": "How the KL coefficient follows its target: 'fixed', 'ppo', 'proportional', 'exponential'."},
    )
    kl_target: float | None = field(default=None, metadata={"help": "Wanted KL to the reference, nats a completion."})
    kl_horizon: float = field(default=10_000, metadata={"help": "Completions over which 'proportional' corrects."})
    kl_rate: float = field(default=0.1, metadata={"help": "Rate of 'exponential', per nat."})
    old_kl_coef: float = field(default=0.0, metadata={"help": "Weight of the KL from the old policy in the loss."})
    old_kl_target: float | None = field(
        default=None, metadata={"help": "Wanted KL from the old policy, nats a token; the coefficient follows it."}
    )
    positive_nll_coef: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of completions that solve their prompt."}
    )
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the language-modelling loss on ptx_dataset."})
    ptx_batch_size: int | None = field(default=None, metadata={"help": "Rows of ptx_dataset per micro-batch."})
    ptx_max_length: int = field(default=1024, metadata={"help": "Tokens after which a row of ptx_dataset is cut."})
    replay_ratio: float = field(default=0.0, metadata={"help": "Share of a step's rows that are replayed."})
    replay_capacity: int = field(default=4, metadata={"help": "Generation batches that can be replayed."})
    num_mini_batches: int | None = field(default=None, metadata={"help": "TRL 1.12's: mini-batches of a batch."})
    total_episodes: int | None = field(default=None, metadata={"help": "TRL 1.12's: completions to train on."})
    stop_token: str | None = field(default=None, metadata={"help": "TRL 1.12's: 'eos' or nothing."})
    stop_token_id: int | None = field(default=None, metadata={"help": "TRL 1.12's: token that ends completions."})
    num_ppo_epochs: int | None = field(default=None, metadata={"help": "TRL 1.12's num_iterations."})
    response_length: int | None = field(default=None, metadata={"help": "TRL 1.12's max_completion_length."})
    cliprange: float | None = field(default=None, metadata={"help": "TRL 1.12's epsilon."})
    local_rollout_forward_batch_size: int | None = field(default=None, metadata={"help": "TRL 1.12's; no effect."})
    num_sample_generations: int | None = field(default=None, metadata={"help": "TRL 1.12's; no effect."})
    sft_model_path: str | None = field(default=None, metadata={"help": "TRL 1.12's; no effect."})
    reward_model_path: str | None = field(default=None, metadata={"help": "TRL 1.12's; no effect."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "TRL 1.12's; no effect."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "TRL 1.12's; no effect."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "TRL 1.12's; no effect."})

    _has_critic: ClassVar[bool] = True

    def _resolve_method(self) -> None:
        self._take_over_names()
        self._check_credit()
        self._check_critic()
        self._check_kl()
        self._check_additions()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_selection()
        if self.total_episodes is not None:
            assert self.generation_batch_size and self.steps_per_generation
            batches = math.ceil(self.total_episodes / self.generation_batch_size)
            updates = self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps
            self.max_steps = math.ceil(batches * updates)

    @contextmanager
    def _shown_to_trl(self) -> Iterator[None]:
        if self.num_generations != 1:
            yield
            return
        # TRL wants two completions of a prompt, to compare them; a critic needs none. What it is shown instead divides
        # every generation batch.
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        rows = self.generation_batch_size or self.per_device_train_batch_size * steps
        shown = rows if rows > 1 else int(os.environ.get("WORLD_SIZE", "1"))
        require(
            shown > 1,
            "A generation batch of a single completion has nothing to whiten advantages with. Raise "
            "per_device_train_batch_size or gradient_accumulation_steps.",
        )
        self.num_generations = shown
        if self.num_generations_eval is None:
            self.num_generations_eval = 1
        yield
        self.num_generations = 1

    def _take_over_names(self) -> None:
        """Arguments of TRL 1.12's PPOConfig."""
        defaults = {f.name: f.default for f in fields(self)}
        for old, new in RENAMED.items():
            value = getattr(self, old)
            if value is None:
                continue
            require(
                getattr(self, new) in (defaults[new], value),
                f"{old}={value} and {new}={getattr(self, new)} set the same thing. Set one of them.",
            )
            setattr(self, new, value)
        for name, instead in DROPPED.items():
            if getattr(self, name) is not None:
                self._notes.append(f"{name} has no effect: {instead}.")
        if self.num_mini_batches is not None:
            self._split_batch(self.num_mini_batches)
        require(
            self.stop_token in (None, "eos"),
            f"stop_token={self.stop_token!r} is unknown. Choose 'eos', or set stop_token_id.",
        )
        require(
            self.stop_token is None or self.stop_token_id is None,
            "stop_token and stop_token_id both end completions. Set one of them.",
        )
        if self.stop_token_id is not None:
            kwargs: Any = self.generation_kwargs
            self.generation_kwargs = {**(kwargs or {}), "eos_token_id": self.stop_token_id}

    def _split_batch(self, mini_batches: int) -> None:
        """Micro-batches of a batch, and how many of them make an optimizer step."""
        set_otherwise = [
            name
            for name in ("steps_per_generation", "generation_batch_size", "updates_per_generation")
            if getattr(self, name) is not None
        ]
        require(
            not set_otherwise,
            f"num_mini_batches={mini_batches} and {' and '.join(set_otherwise)} both split a generation batch. Set "
            "one of them.",
        )
        accumulation, rows = self.gradient_accumulation_steps, self.per_device_train_batch_size
        if accumulation % mini_batches == 0:
            self.steps_per_generation, self.gradient_accumulation_steps = accumulation, accumulation // mini_batches
            return
        require(
            accumulation == 1 and rows % mini_batches == 0,
            f"num_mini_batches={mini_batches} divides neither gradient_accumulation_steps={accumulation} nor, with "
            f"gradient_accumulation_steps=1, per_device_train_batch_size={rows}. Change one of them.",
        )
        self.per_device_train_batch_size, self.steps_per_generation = rows // mini_batches, mini_batches

    def _check_credit(self) -> None:
        for name in ("gamma", "lam", "critic_lam"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name}={value} must lie in [0, 1].")
        require(self.lam_alpha is None or self.lam_alpha > 0, f"lam_alpha={self.lam_alpha} must be positive.")
        require_one_of("reward_scaling", self.reward_scaling, REWARD_SCALINGS)
        for name in ("reward_clip", "missing_eos_penalty", "cliprange_value"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive. None: none.")
        require(
            self.scale_rewards in (None, "none", False),
            f"scale_rewards={self.scale_rewards!r} scales the advantages of groups. For a critic's, use "
            "whiten_advantages, and reward_scaling for the rewards.",
        )
        require(
            self.multi_objective_aggregation == "sum_then_normalize",
            f"multi_objective_aggregation={self.multi_objective_aggregation!r} normalises within groups. With a "
            "critic, use 'sum_then_normalize' and reward_weights.",
        )
        require(
            self.loss_type != "vespo",
            "loss_type='vespo' takes one advantage a completion; generalised advantages differ between tokens. Set "
            "loss_type='dapo'.",
        )
        require(
            not (self.bootstrap_truncated and self.mask_truncated_completions),
            "bootstrap_truncated=True says what truncated completions are worth, mask_truncated_completions=True "
            "leaves them out. Set one of them.",
        )

    def _check_critic(self) -> None:
        require_one_of("critic", self.critic, CRITICS)
        of_head, of_model = ("critic_head", "critic_trunk_grad"), ("critic_init",)
        for name in of_model if self.critic == "head" else of_head:
            value = getattr(self, name)
            require(value is None, f"{name}={value!r} has no effect with critic={self.critic!r}. Leave it out.")
        require_one_of("critic_head", self.critic_head, (None, *HEAD_KINDS))
        require_one_of("critic_init", self.critic_init, (None, *CRITIC_INITS))
        require(
            self.critic_trunk_grad is None or 0 <= self.critic_trunk_grad <= 1,
            f"critic_trunk_grad={self.critic_trunk_grad} is a share: choose it in [0, 1].",
        )
        self._rate_left_open = self.critic_learning_rate is None
        if self.critic_learning_rate is None:
            self.critic_learning_rate = self.learning_rate * (100 if self.critic == "head" else 1)
        require(self.critic_learning_rate > 0, f"critic_learning_rate={self.critic_learning_rate} must be positive.")
        require(self.vf_coef > 0, f"vf_coef={self.vf_coef} must be positive: without it the critic learns nothing.")
        require(self.critic_warmup_steps >= 0, f"critic_warmup_steps={self.critic_warmup_steps} must be at least 0.")
        require(
            self.value_updates_per_policy_update >= 1,
            f"value_updates_per_policy_update={self.value_updates_per_policy_update} must be at least 1.",
        )

    def _check_kl(self) -> None:
        require_one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        for name in ("kl_coef", "old_kl_coef"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be at least 0.")
        if self.kl_rule is None:
            self.kl_rule = "fixed" if self.kl_target is None else "proportional"
        require_one_of("kl_rule", self.kl_rule, KL_RULES)
        require(
            (self.kl_rule == "fixed") == (self.kl_target is None),
            f"kl_rule={self.kl_rule!r} with kl_target={self.kl_target}: a rule needs a target, and a target a rule. "
            "Set both, or neither.",
        )
        for name in ("kl_target", "old_kl_target", "kl_horizon", "kl_rate"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive.")
        require(
            self.kl_target is None or self.kl_coef > 0 or self.beta > 0,
            f"kl_target={self.kl_target} with kl_coef=0 and beta=0: there is no reference to keep close to. Set "
            "kl_coef (KL in the reward) or beta (KL in the loss) to where the coefficient starts.",
        )
        require(
            not (self.kl_coef > 0 and self.beta > 0),
            f"kl_coef={self.kl_coef} and beta={self.beta} both punish the KL to the reference, in the reward and in "
            "the loss. Set one of them to 0.",
        )
        require(
            self.old_kl_target is None or self.old_kl_coef > 0,
            f"old_kl_target={self.old_kl_target} needs a coefficient to start with. Set old_kl_coef.",
        )

    def _check_additions(self) -> None:
        for name in ("positive_nll_coef", "ptx_coef"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be at least 0.")
        require(self.ptx_max_length > 1, f"ptx_max_length={self.ptx_max_length} must be at least 2.")
        require(
            0 <= self.replay_ratio < 1, f"replay_ratio={self.replay_ratio} is a share of a step: choose it in [0, 1)."
        )
        require(self.replay_capacity >= 1, f"replay_capacity={self.replay_capacity} must be at least 1.")

    def _check_selection(self) -> None:
        require(
            self.rollout_selection == "all" or (self.num_generations or 0) > 1,
            f"rollout_selection={self.rollout_selection!r} selects groups whose rewards differ: num_generations="
            f"{self.num_generations} makes none. Set num_generations to 2 or more, or rollout_selection='all'.",
        )
        require(
            self.replay_ratio == 0 or self.replayed_rows > 0,
            f"replay_ratio={self.replay_ratio} of micro-batches of {self.per_device_train_batch_size} new rows is "
            "less than one. Raise per_device_train_batch_size or replay_ratio.",
        )

    @property
    def replayed_rows(self) -> int:
        """Rows that replay adds to each micro-batch."""
        return round(self.per_device_train_batch_size * self.replay_ratio / (1 - self.replay_ratio))


class _StepControl(TrainerCallback):
    """Decides before each optimizer step what of it is taken."""

    def __init__(self, trainer: "PPOTrainer") -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restrict_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.stop_if_broken()


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


class PPOTrainer(ActorCriticSeams):
    """
    PPO on TRL's GRPO trainer. Takes its arguments, and those of TRL 1.12's `PPOTrainer`.

    Args:
        *args, **kwargs:
            Arguments of [`~trl.GRPOTrainer`].
        reward_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            A sequence classification model with one output, as one more reward function. It reads the policy's token
            ids where the data set holds `input_ids`, else text, with the policy's tokenizer: plain text without the
            end-of-sequence token, which TRL's reward trainer appends (`recipes/reward.py` doesn't).
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The reference. Default: the policy as it is now; with PEFT, without the adapter that is trained.
        value_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            A sequence classification model with one output, from which the critic starts; sets `critic="model"`.
        ptx_dataset ([`~datasets.Dataset`], *optional*):
            Text for the language-modelling term: a column `text`, `input_ids`, or `prompt` and `completion`.
        data_collator (*optional*):
            Has no effect: prompts are not padded before generation.
        curriculum ([`~trl_ext.curriculum.schedule.DifficultyCurriculum`], *optional*):
            As in [`GRPOTrainer`].

    Raises:
        ValueError: before a model is loaded where possible, for what can't work together.
        NonFiniteLossError: in training, if the loss is not finite for three steps in a row. What was trained until
            then is saved first.
    """

    config_class: ClassVar[type[GRPOConfig]] = PPOConfig
    args: PPOConfig
    has_value_loss = True
    needs_old_pass = True
    _tag_names = ["trl", "trl_ext", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title        = {{Proximal Policy Optimization Algorithms}},
                author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year         = 2017,
                eprint       = {arXiv:1707.06347},
            }"""),
    }

    def __init__(
        self,
        *args: Any,
        reward_model: PreTrainedModel | str | None = None,
        ref_model: PreTrainedModel | None = None,
        value_model: PreTrainedModel | str | None = None,
        ptx_dataset: Dataset | None = None,
        data_collator: Any = None,
        curriculum: Any = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(trl.GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        given.pop("self")
        if given.get("args") is None:
            given["args"] = self.config_class(f"{model_name(given['model'])}-{self._name}")
        config = given["args"] = self.config_class.adopt(given["args"])
        assert isinstance(config, PPOConfig)
        policy = given["model"]
        if data_collator is not None:
            logger.warning("data_collator has no effect: prompts are not padded before generation.")
        self._check_models(config, policy, ref_model, value_model, reward_model)
        require(
            (given.get("optimizers") or (None, None))[1] is None,
            "`optimizers` holds a learning-rate schedule, which knows nothing of the critic's parameters. Pass "
            "(optimizer, None), and set lr_scheduler_type.",
        )
        self._check_ptx(config, ptx_dataset)
        self._set_up_data(given)
        self._reward_model: RewardModelOnIds | None = None
        if reward_model is not None:
            self._add_reward_model(given, reward_model)
        self._set_up_run(config, ptx_dataset)
        self.needs_reference = config.kl_coef > 0 or config.beta > 0
        self._own_reference = self._reference_of(given, ref_model) if self.needs_reference else None
        self._own_critic = self._critic_model(config, policy, value_model, reward_model)
        super().__init__(**given, curriculum=curriculum)
        self.add_callback(_StepControl(self))

    def _set_up_run(self, config: PPOConfig, ptx_dataset: Dataset | None) -> None:
        """What changes while it runs."""
        self.kl_coef = config.kl_coef
        self.old_kl_coef = config.old_kl_coef
        self._reward_scale = RunningScale()
        self._old_kl = (0.0, 0.0)  # sum and tokens, of the last optimizer step
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._replay = ReplayBuffer(config.replay_capacity, config.seed)
        # Of the optimizer step that is being accumulated
        self._sums: torch.Tensor | None = None
        self._loss_is_finite = True
        self._ptx = None if ptx_dataset is None else PromptStream(ptx_dataset, config.seed)

    # What is refused, or taken over, before a model is loaded

    @staticmethod
    def _check_models(config: PPOConfig, policy: Any, ref_model: Any, value_model: Any, reward_model: Any) -> None:
        require(
            ref_model is None or ref_model is not policy,
            "`model` and `ref_model` are the same object, so that the reference would be trained. Leave out "
            "ref_model: the policy as it is now is the default.",
        )
        require(
            ref_model is None or config.kl_coef > 0 or config.beta > 0,
            "ref_model has no effect with kl_coef=0 and beta=0. Set one of them, or leave ref_model out.",
        )
        if value_model is not None:
            # As in TRL 1.12, whoever brings a value model means it
            for name in ("critic_head", "critic_trunk_grad"):
                value = getattr(config, name)
                require(value is None, f"{name}={value!r} has no effect with a value_model. Leave one of them out.")
            config.critic = "model"
            if config._rate_left_open:
                config.critic_learning_rate = config.learning_rate
            require(
                value_model is not reward_model or isinstance(value_model, str),
                "`reward_model` and `value_model` are the same object, so that the reward would be trained. Load it "
                "twice, or leave out value_model and set critic='model', critic_init='reward'.",
            )
            require(
                config.critic_init is None,
                f"critic_init={config.critic_init!r} has no effect with a value_model. Leave one of them out.",
            )
        require(
            config.critic_init != "reward" or reward_model is not None,
            "critic_init='reward' needs a reward_model to copy. Pass one, or set critic_init='policy'.",
        )
        vocabulary, name = _vocabulary(policy), "The policy"
        for other, its_name in ((value_model, "value_model"), (ref_model, "ref_model")):
            size = None if other is None else _vocabulary(other)
            require(
                size is None or vocabulary is None or size == vocabulary,
                f"{name} has a vocabulary of {vocabulary} tokens, {its_name} one of {size}: they can't read the same "
                "token ids. Use a model with the policy's tokenizer.",
            )
        outputs = getattr(getattr(value_model, "config", None), "num_labels", 1)
        require(outputs == 1, f"value_model has {outputs} outputs. Load it with num_labels=1: a value is one number.")

    @staticmethod
    def _check_ptx(config: PPOConfig, dataset: Any) -> None:
        require(
            (config.ptx_coef > 0) == (dataset is not None),
            f"ptx_coef={config.ptx_coef} {'without a' if dataset is None else 'with a'} ptx_dataset: the "
            "language-modelling term needs both. Set both, or neither.",
        )
        if isinstance(dataset, Dataset):
            columns = set(dataset.column_names)
            require(
                any(needed <= columns for needed in ({"text"}, {"input_ids"}, {"messages"}, {"prompt", "completion"})),
                f"ptx_dataset has only the columns {sorted(columns)}. It needs `text`, `input_ids`, `messages`, or "
                "`prompt` and `completion`.",
            )
            require(len(dataset) > 0, "ptx_dataset is empty.")

    def _set_up_data(self, given: dict[str, Any]) -> None:
        """Data sets of `input_ids`, as TRL 1.12's trainer took them."""
        self._tokenized = False
        tokenized: list[str] = []
        for name in ("train_dataset", "eval_dataset"):
            dataset = given.get(name)
            if not isinstance(dataset, Dataset) or "prompt" in dataset.column_names:
                continue
            if "input_ids" not in dataset.column_names:
                continue
            given[name] = with_tokenized_prompts(dataset, self._tokenizer_of(given).decode)
            self._tokenized |= name == "train_dataset"
            tokenized.append(name)

        require(
            len(tokenized) != 1 or given.get("eval_dataset") is None,
            f"{tokenized} has `input_ids`, and the other data set has not. Bring both as ids, or both as `prompt`.",
        )

    @staticmethod
    def _tokenizer_of(given: dict[str, Any]) -> Any:
        if given.get("processing_class") is None:
            policy = given["model"]
            given["processing_class"] = AutoTokenizer.from_pretrained(
                policy if isinstance(policy, str) else policy.config.name_or_path
            )
        processor = given["processing_class"]
        return getattr(processor, "tokenizer", processor)

    def _add_reward_model(self, given: dict[str, Any], model: PreTrainedModel | str) -> None:
        funcs = given.get("reward_funcs")
        funcs = [] if funcs is None else list(funcs) if isinstance(funcs, list) else [funcs]
        classes = given.get("reward_processing_classes")
        classes = classes if isinstance(classes, list) else [classes] * len(funcs)
        tokenizer = self._tokenizer_of(given)
        if self._tokenized:
            if isinstance(model, str):
                model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
            pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            size = given["args"].per_device_train_batch_size
            self._reward_model = RewardModelOnIds(model, model_name(model), pad, size)
        given["reward_funcs"] = [*funcs, self._reward_model or model]
        given["reward_processing_classes"] = [*classes, None if isinstance(model, str) else tokenizer]

    # Roles

    @staticmethod
    def _reference_of(given: dict[str, Any], ref_model: Any) -> Any:
        """A reference that TRL can't load by name."""
        policy = given["model"]
        if ref_model is not None or isinstance(policy, str) or _is_adapted(policy) or given.get("peft_config"):
            return ref_model
        if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
            return None  # sharded at load: TRL loads it again
        return copy.deepcopy(policy)

    @staticmethod
    def _critic_model(config: PPOConfig, policy: Any, value_model: Any, reward_model: Any) -> ModelCritic | None:
        """The critic of `critic="model"`, before the policy is wrapped and changed."""
        if config.critic != "model":
            return None
        source = value_model or (reward_model if config.critic_init == "reward" else policy)
        if isinstance(source, str):
            # In float32 unless said otherwise, as TRL loads what it trains
            own: Any = config.model_init_kwargs if source is policy else None
            settings = {"dtype": torch.float32, **(own or {})}
            critic = ModelCritic(AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **settings))
            if source is policy:
                torch.nn.init.zeros_(critic.score.weight)  # its file has no such head
            return critic
        if source is policy:
            return ModelCritic.on_backbone_of(policy)
        return ModelCritic(source if source is value_model else copy.deepcopy(source))

    @contextmanager
    def _asking_for_passes(self, holder: Any) -> Iterator[None]:
        before = holder.args.sync_ref_model if holder is self else holder.sync_ref_model
        with super()._asking_for_passes(holder):
            if holder is self:
                yield
                return
            # TRL refuses to refresh adapters, and would load a reference that is here already
            holder.sync_ref_model = False
            holder.beta = 0.0 if self._own_reference is not None else holder.beta
            try:
                yield
            finally:
                holder.sync_ref_model = before

    def _set_up_roles(self, config: GRPOConfig) -> None:
        assert isinstance(config, PPOConfig)
        critic: Critic | None = self._own_critic
        if critic is None:
            size = self.model.config.get_text_config().hidden_size
            critic = HeadCritic(size, config.critic_head or "linear", config.critic_trunk_grad or 0.0)
        self.attach_critic(critic)
        if self._own_reference is not None:
            self.use_reference(self._own_reference)
        if config.sync_ref_model:
            require(
                self.needs_reference,
                "sync_ref_model=True with kl_coef=0 and beta=0: there is no reference to refresh. Set one of them.",
            )
            self.keep_reference_fresh()
        if self._reward_model is not None:
            self._reward_model.model = self.prepared(self._reward_model.model)
        self._own_reference = self._own_critic = None
        if config.stop_token_id is not None:
            self.eos_token_ids = [config.stop_token_id]  # TRL cuts completions by it, and so do we
        self._check_vision()

    def _check_vision(self) -> None:
        require(
            self.args.replay_ratio == 0 or not self._is_vlm,
            "replay_ratio with images: rows of earlier batches have other numbers of them. Set replay_ratio=0.",
        )

    # Credit

    def _sum(self, sums: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        reduced: torch.Tensor = self.accelerator.reduce(sums, reduction="sum")
        return reduced

    @property
    def may_credit_late(self) -> bool:  # type: ignore[override]
        """
        Where a generation batch is one micro-batch, its first update computes what a pass of the old policy would, and
        whitening sees all of its rows. What needs advantages before, or rows in their order, keeps the pass.
        """
        args = self.args
        return (
            args.steps_per_generation == 1
            and args.replay_ratio == 0
            and not args.log_completions
            and not (args.use_vllm and args.vllm_importance_sampling_correction)
        )

    def credit_tokens(self, output: dict[str, Any], rewards: torch.Tensor, training: bool) -> None:
        scores = aggregate_rewards(rewards, self.reward_weights, "sum_then_normalize", 1)  # (B,)
        output["scores"] = scores
        output["token_rewards"] = self._token_rewards(output, rewards, scores, training)
        if self.args.positive_nll_coef:
            outcomes = self.group_outcomes(rewards, 1).squeeze(1)
            output["is_right"] = (outcomes.nan_to_num(nan=-math.inf) >= self.args.success_threshold).float()
        if not self.batch.credits_late:
            row_means = self._estimate(output, self.batch.extras[0], training)
            self._relog("advantages", self.accelerator.gather(row_means).tolist())

    def credit_late(
        self, inputs: dict[str, Any], per_token_logps: torch.Tensor, extras: tuple[torch.Tensor, ...]
    ) -> None:
        if "token_rewards" in inputs:
            inputs["old_per_token_logps"] = per_token_logps
            self._estimate(inputs, extras[0].detach(), training=True)

    @torch.no_grad()
    def _estimate(self, output: dict[str, Any], states: torch.Tensor, training: bool) -> torch.Tensor:
        """
        Advantages and returns, from the rewards of tokens and the values of `states` `(B, T + 1)`, before each token
        and after the last. Returns the mean advantage of each row.
        """
        args, scores, token_rewards = self.args, output.pop("scores"), output.pop("token_rewards")
        completion_mask = output["completion_mask"]
        mask = completion_mask * output.get("tool_mask", 1)  # (B, T)
        lengths, scored = completion_mask.sum(dim=1), ~scores.isnan()
        per_token_kl = self._kl_to_reference(output, mask)
        penalty = self.kl_coef * per_token_kl
        token_rewards = (token_rewards - penalty) * completion_mask
        if args.whiten_rewards:
            token_rewards = whiten(carried_back(token_rewards, mask), mask, shift_mean=False, reduce=self._sum)
        values = states[:, :-1] * mask
        last = None
        if args.bootstrap_truncated:
            last = states.gather(1, lengths.unsqueeze(1)).squeeze(1) * ~self._ended(output, lengths)
        lam = args.lam if args.lam_alpha is None else length_adaptive_lam(mask.sum(dim=1), args.lam_alpha)
        advantages, returns = gae(token_rewards, values, mask, args.gamma, lam, last)
        critic_lam = args.lam if args.critic_lam is None else args.critic_lam
        if args.lam_alpha is not None or critic_lam != args.lam:
            _, returns = gae(token_rewards, values, mask, args.gamma, critic_lam, last)
        # What no function could score teaches nothing
        credited = mask * scored.unsqueeze(1)
        returns = torch.where(scored.unsqueeze(1), returns, values)
        explained = explained_variance(values, returns, credited, self._sum)
        if args.whiten_advantages:
            advantages = whiten(advantages, credited, reduce=self._sum)
        output["advantages"] = advantages * credited
        output["old_values"], output["returns"] = values, returns
        real = lengths > 0  # not what fills up a micro-batch
        self._log_credit(scores[real], per_token_kl, penalty, values, returns, credited, explained, training)
        row_means: torch.Tensor = output["advantages"].sum(dim=1) / credited.sum(dim=1).clamp(min=1)
        return row_means

    def _ended(self, output: dict[str, Any], lengths: torch.Tensor) -> torch.Tensor:
        """Whether each completion `(B,)` came to its end by itself."""
        last = output["completion_ids"].gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
        return torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device)).squeeze(1) & (lengths > 0)

    def _token_rewards(
        self,
        output: dict[str, Any],
        rewards: torch.Tensor,
        scores: torch.Tensor,
        training: bool,
    ) -> torch.Tensor:
        """Rewards by token `(B, T)`, without KL: steps where they were earned, the rest at the last token."""
        lengths = output["completion_mask"].sum(dim=1)
        earned = torch.zeros_like(output["completion_ids"], dtype=torch.float32)
        final = (rewards * self.reward_weights.to(rewards)).nan_to_num(nan=0.0)  # (B, F)
        for row, by_column in enumerate(self.batch.step_rewards):
            for column, reward in by_column.items():
                final[row, column] = 0.0
                for position, value in reward.steps:
                    earned[row, position] += float(self.reward_weights[column]) * value
        last = (lengths - 1).clamp(min=0).unsqueeze(1)
        earned = earned.scatter_add(1, last, final.sum(dim=1, keepdim=True))
        earned = earned / self.reward_deviation(scores, training)
        if self.args.reward_clip is not None:
            earned = earned.clamp(-self.args.reward_clip, self.args.reward_clip)
        if self.args.missing_eos_penalty is not None:
            missing = ~self._ended(output, lengths) * self.args.missing_eos_penalty
            earned = earned.scatter_add(1, last, -missing.unsqueeze(1).float())
        return earned

    def reward_deviation(self, scores: torch.Tensor, training: bool) -> float:
        """What `scores` `(B,)` are divided by, under `reward_scaling`; training moves the running one."""

        def finite_scores() -> list[float]:
            gathered = self.accelerator.gather(scores)
            return list(gathered[gathered.isfinite()].tolist())

        return REWARD_SCALINGS[self.args.reward_scaling](finite_scores, self._reward_scale, training)

    def _kl_to_reference(self, output: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        reference = output.get("ref_per_token_logps")
        if reference is None:
            return torch.zeros_like(output["old_per_token_logps"])
        if not self.beta:
            del output["ref_per_token_logps"]  # the loss has no use for it
        return kl_estimate(output["old_per_token_logps"], reference, self.args.kl_estimator) * mask

    def _log_credit(
        self,
        scores: torch.Tensor,
        per_token_kl: torch.Tensor,
        penalty: torch.Tensor,
        values: torch.Tensor,
        returns: torch.Tensor,
        mask: torch.Tensor,
        explained: float,
        training: bool,
    ) -> None:
        """Metrics under TRL 1.12's names, over completions or tokens of all ranks; the coefficients follow."""
        metrics = self._metrics["train" if training else "eval"]
        known = ~scores.isnan()
        sums = [len(scores), known.sum(), scores[known].sum(), per_token_kl.sum(), penalty.sum()]
        sums += [mask.sum(), (values * mask).sum(), (returns * mask).sum()]
        rows, of, score, kl, punished, tokens, value, target = self._sum(
            torch.stack([torch.as_tensor(part, device=values.device, dtype=torch.float32) for part in sums])
        ).tolist()
        metrics["objective/scores"].append(score / max(of, 1))
        metrics["val/explained_variance"].append(explained)
        metrics["val/value"].append(value / max(tokens, 1))
        metrics["val/return"].append(target / max(tokens, 1))
        if not self.needs_reference:
            return
        metrics["objective/kl"].append(kl / rows)
        metrics["objective/non_score_reward"].append(-punished / rows)
        metrics["objective/rlhf_reward"].append(score / max(of, 1) - punished / rows)
        metrics["objective/kl_coef"].append(self.kl_coef or self.beta)
        if training:
            self._follow_target(kl / rows, int(rows))

    def _follow_target(self, kl: float, completions: int) -> None:
        args = self.args
        if args.kl_target is None:
            return
        assert args.kl_rule is not None
        coef = adapted_kl_coef(
            self.kl_coef or self.beta,
            kl,
            args.kl_target,
            args.kl_rule,
            horizon=args.kl_horizon,
            samples=completions,
            rate=args.kl_rate,
        )
        if args.kl_coef:
            self.kl_coef = coef
        else:
            self.beta = coef

    # Loss

    @property
    def policy_is_frozen(self) -> bool:
        """Whether this optimizer step moves only the critic."""
        period = self.args.value_updates_per_policy_update
        step = self.state.global_step - self.args.critic_warmup_steps
        return step < 0 or step % period != period - 1

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        self._follow_old_policy()
        if self.args.replay_ratio:
            self._add_replayed(micro_batches)
        super().on_new_buffer(micro_batches)

    def _follow_old_policy(self) -> None:
        """A generation batch is used up: how far did the policy move on it?"""
        args, (total, tokens) = self.args, self._old_kl
        if args.old_kl_target is not None and tokens:
            self.old_kl_coef = adapted_kl_coef(
                self.old_kl_coef, total / tokens, args.old_kl_target, "ppo", horizon=1, samples=1, rate=1
            )
            self.train_metrics["policy/old_kl_coef"].append(self.old_kl_coef)
        self._old_kl = (0.0, 0.0)

    def _add_replayed(self, micro_batches: list[dict[str, Any]]) -> None:
        fresh = list(micro_batches)
        needed = self.args.replayed_rows * len(micro_batches)
        if len(self._replay) >= needed:  # as full on every rank
            rows, added = self._replay.draw(needed), 0
            for i, batch in enumerate(fresh):
                own = rows[i * self.args.replayed_rows : (i + 1) * self.args.replayed_rows]
                added += sum(int((row["completion_mask"] * row.get("tool_mask", 1)).sum()) for row in own)
                micro_batches[i] = append_rows(batch, own)
            total = self._sum(torch.tensor(added, device=self.accelerator.device))
            for batch in micro_batches:
                batch["num_items_in_batch"] = batch["num_items_in_batch"] + total
        rows_before = sum(len(batch["completion_ids"]) for batch in fresh)
        rows_now = sum(len(batch["completion_ids"]) for batch in micro_batches)
        self.train_metrics["replay/ratio"].append(1 - rows_before / rows_now)
        self._replay.add(fresh)

    def _tokens_of_step(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What a sum over the tokens of a micro-batch is divided by: TRL's normaliser of `loss_type="dapo"`."""
        tokens: torch.Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if not self.model.training:
            return tokens
        assert self.args.steps_per_generation
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def added_loss(self, loss: torch.Tensor, model: Any, inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Any:
        args, (logps, _, _, states) = self.args, outputs
        training, tokens = self.model.training, self._tokens_of_step(inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        fit, clipped = value_loss(states[:, :-1], inputs["old_values"], inputs["returns"], args.cliprange_value)
        old = inputs["old_per_token_logps"]
        from_old = kl_estimate(old, logps, "k3")  # samples of π_old: KL(π_old‖π_θ)
        frozen = training and self.policy_is_frozen
        policy_loss = loss.detach()
        if frozen:
            loss = (logps * 0.0).sum()  # in the graph, for processes to agree on it
        else:
            loss = loss + self._added_policy_loss(model, inputs, logps, from_old, mask, tokens)
        total = loss + args.vf_coef * (fit * mask).sum() / tokens
        if not training:
            return total
        log_ratio = (logps - old).detach() * mask
        sums = [mask, fit * mask, clipped * mask, 0.5 * log_ratio.square(), log_ratio.exp() * mask, from_old * mask]
        self._observe_loss(torch.stack([part.detach().float().sum() for part in sums]), policy_loss, total)
        if bool(total.isfinite()):
            return total
        # A graph without the value that can't be used; the step is skipped
        return (logps.nan_to_num() * 0.0).sum() + (states.nan_to_num() * 0.0).sum()

    def _added_policy_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        logps: torch.Tensor,
        from_old: torch.Tensor,
        mask: torch.Tensor,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        args = self.args
        added = logps.new_zeros(())
        if self.old_kl_coef:
            added = added + self.old_kl_coef * (from_old * mask).sum() / tokens
        if args.positive_nll_coef:
            right = mask * inputs["is_right"].unsqueeze(1)
            added = added - args.positive_nll_coef * (logps * right).sum() / tokens
        if self._ptx is not None and self.model.training:
            # DDP wants one forward a backward, and reduces the gradients of the module below it all the same
            below = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
            lm_loss = below(**self._ptx_batch()).loss
            mean = self._sum(lm_loss.detach()) / self.accelerator.num_processes
            self.train_metrics["loss/ptx_avg"].append(mean.item())
            added = added + args.ptx_coef * lm_loss / self.current_gradient_accumulation_steps
        return added

    def _ptx_batch(self) -> dict[str, torch.Tensor]:
        assert self._ptx is not None
        size = self.args.ptx_batch_size or self.args.per_device_train_batch_size
        rows = self._ptx.take(size * self.accelerator.num_processes)
        start = self.accelerator.process_index * size
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        return language_modelling_batch(
            rows[start : start + size], tokenizer, self.args.ptx_max_length, self.accelerator.device
        )

    def _observe_loss(self, sums: torch.Tensor, policy_loss: torch.Tensor, total: torch.Tensor) -> None:
        """Add up what a micro-batch says of its optimizer step; at the end of the step, log it and decide on it."""
        sums = torch.cat([sums, policy_loss.view(1), (~total.isfinite()).float().view(1)])
        self._sums = sums if self._sums is None else self._sums + sums
        if not self.accelerator.sync_gradients:
            return
        tokens, fit, clipped, moved, ratio, from_old, policy, broken = self._sum(self._sums).tolist()
        self._sums, self._loss_is_finite = None, broken == 0
        if broken:
            return
        self._old_kl = (from_old, tokens)
        metrics, tokens = self.train_metrics, max(tokens, 1)
        metrics["loss/value_avg"].append(fit / tokens)
        metrics["loss/policy_avg"].append(policy / self.accelerator.num_processes)
        metrics["val/clipfrac_avg"].append(clipped / tokens)
        metrics["policy/approxkl_avg"].append(moved / tokens)
        metrics["val/ratio"].append(ratio / tokens)
        if self.args.old_kl_coef:
            metrics["policy/old_kl"].append(from_old / tokens)

    # What an optimizer step takes

    def restrict_step(self) -> None:
        """
        Called before each optimizer step: takes gradients away from what must not move. DeepSpeed's are out of reach,
        and its learning rate is set to 0 instead, until the schedule sets it again.
        """
        if self._loss_is_finite and not self.policy_is_frozen:
            return
        assert self.optimizer is not None
        own = {id(parameter) for parameter in self.critic.parameters()} if self._loss_is_finite else set()
        for group in self.optimizer.param_groups:
            if self.is_deepspeed_enabled and not (own and group.get("is_critic")):
                group["lr"] = 0.0
            for parameter in group["params"]:
                if id(parameter) not in own:
                    parameter.grad = None

    def stop_if_broken(self) -> None:
        """Called after each optimizer step: counts those that were skipped, and stops after too many in a row."""
        if self._loss_is_finite:
            self._skipped_in_a_row = 0
            return
        self._loss_is_finite = True
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        self.train_metrics["skipped_steps"] = [self.skipped_steps]
        logger.warning(f"The loss of step {self.state.global_step} is not finite: the step is skipped.")
        if self._skipped_in_a_row < MOST_SKIPPED_STEPS:
            return
        error = NonFiniteLossError(
            f"The loss was not finite for {MOST_SKIPPED_STEPS} steps in a row. Lower learning_rate or "
            "critic_learning_rate, set reward_scaling='running' or reward_clip, and look at the rewards."
        )
        self.save_before_stopping(error)
        raise error

    # Checkpoints

    def run_state(self) -> dict[str, Any]:
        state = super().run_state() | {
            "kl_coef": self.kl_coef,
            "beta": self.beta,
            "old_kl_coef": self.old_kl_coef,
            "old_kl": self._old_kl,
            "reward_scale": asdict(self._reward_scale),
            "skipped": (self.skipped_steps, self._skipped_in_a_row),
        }
        return state if self._ptx is None else state | {"ptx": self._ptx.state_dict()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        super().load_run_state(state)
        if "kl_coef" not in state:  # of a trainer without a critic
            return
        self.kl_coef, self.beta, self.old_kl_coef = state["kl_coef"], state["beta"], state["old_kl_coef"]
        self._old_kl = state["old_kl"]
        self._reward_scale = RunningScale(**state["reward_scale"])
        self.skipped_steps, self._skipped_in_a_row = state["skipped"]
        if self._ptx is not None and "ptx" in state:
            self._ptx.load_state_dict(state["ptx"])

    def process_state(self) -> dict[str, Any]:
        return super().process_state() | ({"replay": self._replay.state_dict()} if self.args.replay_ratio else {})

    def load_process_state(self, state: dict[str, Any]) -> None:
        super().load_process_state(state)
        if "replay" in state:
            self._replay.load_state_dict(state["replay"])


def _vocabulary(model: Any) -> int | None:
    """Tokens that a model, or the model of that name, knows; `None` if that can't be told without loading it."""
    if isinstance(model, str):
        try:
            config: Any = AutoConfig.from_pretrained(model)
        except OSError:  # whoever loads it will say so
            return None
    else:
        config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def language_modelling_batch(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int, device: Any
) -> dict[str, torch.Tensor]:
    """
    Rows of text as a right-padded batch for a causal language model, with its labels: all tokens, or those of the
    completion where there are a prompt and a completion.

    Args:
        rows (`list[dict]`):
            With `input_ids`, `text`, `messages`, or `prompt` and `completion`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        max_length (`int`):
            Tokens after which a row is cut.
        device:
            Where the batch goes.
    """

    def encoded(row: dict[str, Any]) -> tuple[list[int], int]:
        """Tokens, and how many at the start have no label."""
        end = [tokenizer.eos_token_id]
        if "input_ids" in row:
            return list(row["input_ids"]), 0
        if "messages" in row:
            return tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"], 0
        if "text" in row:
            return tokenizer(text=row["text"])["input_ids"] + end, 0
        if isinstance(row["prompt"], list):  # of messages
            prompt = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)
            return whole["input_ids"], len(prompt)
        prompt = tokenizer(text=row["prompt"])["input_ids"]
        return tokenizer(text=row["prompt"] + row["completion"])["input_ids"] + end, len(prompt)

    def cut(ids: list[int], start: int) -> tuple[list[int], int]:
        """A prompt loses its start, so that the completion is still there to learn."""
        lost = min(start, max(len(ids) - max_length, 0))
        return ids[lost:][:max_length], start - lost

    parts = [cut(*encoded(row)) for row in rows]
    longest = max(len(ids) for ids, _ in parts)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, start in parts:
        missing = longest - len(ids)
        batch["input_ids"].append(ids + [0] * missing)
        batch["attention_mask"].append([1] * len(ids) + [0] * missing)
        batch["labels"].append([-100] * start + ids[start:] + [-100] * missing)
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}
