"""
The arguments of PPO: defaults, and what is refused before anything is loaded.
"""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ..errors import require, require_one_of
from ..objectives.kl import KL_ESTIMATORS, KL_RULES
from ..objectives.ppo import LOSS_TERMS
from ..rewards.scaling import REWARD_SCALINGS
from ..roles.critic import CRITICS, Critic, critic_class
from .policy_schedule import check_warmup
from .trl_1_12 import TRL112Arguments


@dataclass
class PPOConfig(TRL112Arguments):
    """
    [`~trl_ext.GRPOConfig`] with PPO's defaults, which are those of TRL 1.12's trainer unless said otherwise:
    generalised advantages, one completion per prompt, four epochs on each generation batch, clip range 0.2, learning
    rate 3e-6, KL to the reference in the reward. `loss_type`, `epsilon`, `entropy_coef`, `importance_sampling_level`
    and all other arguments of TRL's keep their meaning. Arguments of TRL 1.12's `PPOConfig` are accepted, too
    ([`~trl_ext.trainers.trl_1_12.TRL112Arguments`]).

    Args:
        critic (`str`, *optional*, defaults to `"head"`):
            Source of the values, a key of [`~trl_ext.roles.critic.CRITICS`]. `"head"`: a head on the policy's last
            hidden state. `"adapter"`: an adapter and a head of its own on the policy's frozen base model, for policies
            with an adapter (LoRA). `"model"`: a model of its own.
        critic_head (`str`, *optional*):
            For `critic="head"` and `critic="adapter"`: `"linear"` or `"mlp"`. `None`: `"linear"`.
        critic_trunk_grad (`float`, *optional*):
            For `critic="head"`: share of the value gradient, in [0, 1], that reaches the policy's trunk. `None`: 0.
        critic_init (`str`, *optional*):
            For `critic="model"` without a `value_model`: whether it starts as a copy of the `"policy"` or of the
            `"reward"` model. `None`: `"policy"`.
        critic_lora_r (`int`, *optional*):
            For `critic="adapter"`: rank of the critic's adapter. `None`: that of the policy's.
        critic_lora_alpha (`float`, *optional*):
            For `critic="adapter"`: α of the critic's adapter. `None`: that of the policy's.
        critic_learning_rate (`float`, *optional*):
            The critic's learning rate. `None`: `learning_rate` times the `learning_rate_factor` of the critic's class.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of optimizer steps at the start that move only the critic, towards the Monte-Carlo returns (λ = 1)
            of the policy as it is: VAPO's value pretraining. They are steps of the run like all others (`max_steps`,
            logging, checkpoints). The policy's learning-rate schedule, and the rules by which KL coefficients adapt,
            begin after them.
        critic_warmup_explained_variance (`float`, *optional*):
            Ends these steps early: the step is the last of them whose generation batch has at least this explained
            variance, before the critic learned from it. `None`: they are as many as `critic_warmup_steps` says.
        value_updates_per_policy_update (`int`, *optional*, defaults to `1`):
            Number of optimizer steps of the critic for each one of the policy. The last of them moves both, the others
            only the critic.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss c₁.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            How far a value may move from the one at rollout time. `None`: no limit.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount γ.
        lam (`float`, *optional*, defaults to `0.95`):
            λ of generalised advantage estimation: 0 is temporal difference, 1 Monte Carlo.
        lam_alpha (`float`, *optional*):
            α of VAPO's length-adaptive λ = 1 − 1/(α·length), which then replaces `lam` for advantages.
        critic_lam (`float`, *optional*):
            λ of the returns, the critic's targets. `None`: `lam`.
        bootstrap_truncated (`bool`, *optional*, defaults to `False`):
            Whether a completion that was cut off is worth the value of its last state after its end. `False`: 0.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether advantages are shifted and scaled to mean 0 and variance 1 over the tokens of all processes.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Whether token rewards are scaled to variance 1, around their mean.
        reward_scaling (`str`, *optional*, defaults to `"none"`):
            Divisor of the rewards: 1 (`"none"`), the standard deviation of the scores of the `"batch"`, or that of all
            scores so far (`"running"`).
        reward_clip (`float`, *optional*):
            Largest magnitude of the reward of a token, after scaling. `None`: no limit.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the score of completions without end-of-sequence token, after scaling and clipping.
        kl_coef (`float`, *optional*):
            Weight of the KL to the reference in the reward: samples of π_θ estimate KL(π_θ‖π_ref). 0: no such term.
            `None`: 0.05, or 0 if `beta` is set, which puts the same divergence, by k3, into the loss.
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            `"k1"`, `"k2"` or `"k3"`, see [`~trl_ext.objectives.kl.kl_estimate`].
        kl_rule (`str`, *optional*):
            Rule by which `kl_coef` (or `beta`, if `kl_coef` is 0) follows `kl_target`: `"ppo"`, `"proportional"` or
            `"exponential"`, see [`~trl_ext.objectives.kl.adapted_kl_coef`]. `None`: `"proportional"` if there is a
            target, else `"fixed"`.
        kl_target (`float`, *optional*):
            Wanted KL to the reference, in nats per completion.
        kl_horizon (`float`, *optional*, defaults to `10000`):
            Number of completions over which the rule `"proportional"` corrects a deviation.
        kl_rate (`float`, *optional*, defaults to `0.1`):
            Rate of the rule `"exponential"`, per nat.
        old_kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of KL(π_old‖π_θ), by k3, in the loss: PPO's second variant (eq. 8). To replace the clip by it, set a
            large `epsilon`.
        old_kl_target (`float`, *optional*):
            Wanted KL(π_old‖π_θ) at the end of a generation batch, in nats per token. `old_kl_coef` follows it by the
            rule `"ppo"`.
        positive_nll_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of completions that solve their prompt (VAPO's μ): a mean over their
            tokens, in the mini-batch or generation batch as `token_normalization` says.
        loss_terms (`dict[str, float]`, *optional*):
            Weights of further terms of the loss, by their names in [`~trl_ext.objectives.ppo.LOSS_TERMS`]; on the
            command line as JSON.
        ptx_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the next-token loss on `ptx_dataset` (PPO-ptx).
        ptx_batch_size (`int`, *optional*):
            Rows of `ptx_dataset` for each micro-batch of a process. `None`: `per_device_train_batch_size`.
        ptx_max_length (`int`, *optional*, defaults to `1024`):
            Number of tokens to which such a row is cut.
        replay_ratio (`float`, *optional*, defaults to `0.0`):
            Share of the rows of a step, in [0, 1), that come from earlier generation batches. They are added to the
            new rows, so that micro-batches grow.
        replay_capacity (`int`, *optional*, defaults to `4`):
            Number of generation batches that are kept for replay.
    """

    advantage_estimator: str = field(default="gae", metadata={"help": "Generalised advantage estimation."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt."})
    num_iterations: int = field(default=4, metadata={"help": "Epochs on each generation batch."})
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of the policy."})
    critic: str = field(
        default="head",
        metadata={"help": "A 'head' on the policy's hidden state, an 'adapter' on its base, or a 'model' of its own."},
    )
    critic_head: str | None = field(default=None, metadata={"help": "'linear' or 'mlp'."})
    critic_trunk_grad: float | None = field(
        default=None, metadata={"help": "Share of the value gradient that reaches the policy's trunk. None: 0."}
    )
    critic_init: str | None = field(
        default=None, metadata={"help": "What a critic model is a copy of: 'policy' or 'reward'."}
    )
    critic_lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the critic's adapter. None: that of the policy's."}
    )
    critic_lora_alpha: float | None = field(
        default=None, metadata={"help": "Alpha of the critic's adapter. None: that of the policy's."}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the critic."})
    critic_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps at the start that move only the critic, towards Monte-Carlo returns."},
    )
    critic_warmup_explained_variance: float | None = field(
        default=None, metadata={"help": "Explained variance that ends these steps early. None: nothing does."}
    )
    value_updates_per_policy_update: int = field(
        default=1, metadata={"help": "Optimizer steps of the critic for each one of the policy."}
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
        default="none", metadata={"help": "Deviation that rewards are divided by: 'none', 'batch' or 'running'."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Largest magnitude of a reward."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of completions that don't end."}
    )
    kl_coef: float | None = field(
        default=None, metadata={"help": "Weight of the KL to the reference in the reward. None: 0.05, or 0 with beta."}
    )
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
    loss_terms: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weights of further terms of the loss, by their names in objectives/ppo.py."}
    )
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the language-modelling loss on ptx_dataset."})
    ptx_batch_size: int | None = field(default=None, metadata={"help": "Rows of ptx_dataset per micro-batch."})
    ptx_max_length: int = field(default=1024, metadata={"help": "Tokens to which a row of ptx_dataset is cut."})
    replay_ratio: float = field(default=0.0, metadata={"help": "Share of a step's rows that are replayed."})
    replay_capacity: int = field(default=4, metadata={"help": "Generation batches that are kept for replay."})

    _has_critic: ClassVar[bool] = True
    # A method's own, beside that of the critic's class
    _critic_rate_factor: ClassVar[float] = 1.0

    def _resolve_method(self) -> None:
        super()._resolve_method()
        self._check_credit()
        self._check_critic()
        self._check_kl()
        self._check_additions()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_selection()
        if self.max_steps > 0:
            check_warmup(self.critic_warmup_steps, self.max_steps)

    @contextmanager
    def _shown_to_trl(self) -> Iterator[None]:
        if self.num_generations != 1:
            yield
            return
        # TRL asks for at least two completions of a prompt, to compare them; with a critic, one is enough. The number
        # that TRL is shown divides every generation batch.
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

    def _check_credit(self) -> None:
        for name in ("gamma", "lam", "critic_lam"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name}={value} must lie in [0, 1].")
        require(self.lam_alpha is None or self.lam_alpha > 0, f"lam_alpha={self.lam_alpha} must be positive.")
        require_one_of("reward_scaling", self.reward_scaling, REWARD_SCALINGS)
        for name in ("reward_clip", "missing_eos_penalty", "cliprange_value"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be positive. None switches it off.")
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
        require(
            not (self.missing_eos_penalty is not None and self.mask_truncated_completions),
            f"missing_eos_penalty={self.missing_eos_penalty} punishes truncated completions, "
            "mask_truncated_completions=True leaves them out, so that it has no effect. Set one of them.",
        )

    def _check_critic(self) -> None:
        chosen = critic_class(self.critic)
        for name in sorted({name for kind in CRITICS.values() for name in kind.settings} - {*chosen.settings}):
            value = getattr(self, name)
            require(value is None, f"{name}={value!r} has no effect with critic={self.critic!r}. Leave it out.")
        chosen.check_settings(self)
        self._rate_left_open = self.critic_learning_rate is None
        if self.critic_learning_rate is None:
            self.critic_learning_rate = self._usual_rate(chosen)
        require(self.critic_learning_rate > 0, f"critic_learning_rate={self.critic_learning_rate} must be positive.")
        require(self.vf_coef > 0, f"vf_coef={self.vf_coef} must be positive: without it the critic learns nothing.")
        require(self.critic_warmup_steps >= 0, f"critic_warmup_steps={self.critic_warmup_steps} must be at least 0.")
        wanted = self.critic_warmup_explained_variance
        require(
            wanted is None or self.critic_warmup_steps > 0,
            f"critic_warmup_explained_variance={wanted} has no effect with critic_warmup_steps=0. Set the largest "
            "number of steps that it may take, or leave it out.",
        )
        require(
            wanted is None or wanted < 1,
            f"critic_warmup_explained_variance={wanted} must be less than 1, which a perfect critic has.",
        )
        require(
            self.value_updates_per_policy_update >= 1,
            f"value_updates_per_policy_update={self.value_updates_per_policy_update} must be at least 1.",
        )

    def _usual_rate(self, chosen: type[Critic]) -> float:
        """The critic's learning rate, if none is set."""
        return self.learning_rate * chosen.learning_rate_factor * self._critic_rate_factor

    def _check_kl(self) -> None:
        if self.kl_coef is None:
            self.kl_coef = 0.0 if self.beta else 0.05
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
            f"kl_target={self.kl_target} with kl_coef=0 and beta=0: there is no reference to keep close to. Set the "
            "first value of the coefficient: kl_coef (KL in the reward) or beta (KL in the loss).",
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
        given: Any = json.loads(self.loss_terms) if isinstance(self.loss_terms, str) else self.loss_terms
        self.loss_terms = dict(given or {})
        named = {"old_policy_kl": "old_kl_coef", "positive_nll": "positive_nll_coef"}
        for name in self.loss_terms:
            require_one_of("a name in loss_terms", name, LOSS_TERMS)
            require(name not in named, f"loss_terms names {name!r}, whose weight is {named.get(name)}. Set that.")
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
            "less than one row. Raise per_device_train_batch_size or replay_ratio.",
        )

    @property
    def replayed_rows(self) -> int:
        """Rows that replay adds to each micro-batch."""
        return round(self.per_device_train_batch_size * self.replay_ratio / (1 - self.replay_ratio))

    def with_critic(self, critic: str) -> Self:
        """A copy of this configuration with a different critic, and its default learning rate unless one was set."""
        config = copy.copy(self)
        config.critic = critic
        if self._rate_left_open:
            config.critic_learning_rate = self._usual_rate(critic_class(critic))
        return config
