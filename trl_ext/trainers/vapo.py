"""
VAPO: Value-model-based Augmented Proximal Policy Optimization (https://huggingface.co/papers/2504.05118).

PPO whose critic is made fit for long completions with one reward at their end. All of it is settings of [`PPOConfig`]:

| in the paper | setting |
|---|---|
| value pretraining on Monte-Carlo returns of the fixed policy (section 4.1) | `critic_warmup_steps` |
| decoupled GAE (section 4.1): λ_critic = 1 | `critic_lam` |
| length-adaptive GAE (section 4.2): λ_policy = 1 − 1/(α·length), clamped to [0, 1] | `lam_alpha` |
| token-level loss (section 4.2) | `loss_type`, `token_normalization` |
| clip-higher (section 4.3) | `epsilon_high` |
| negative log-likelihood of correct completions (section 4.3): μ | `positive_nll_coef` |
| groups (section 4.3) | `num_generations` |

With α = 0.05, λ_policy is 0 for completions of up to 20 tokens, 0.8 at 100 and 0.98 at 1,000: for short ones, set a
larger α. It assumes rewards that say which completions are correct (`success_threshold`).
"""

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from .ppo import PPOTrainer
from .ppo_config import PPOConfig


@dataclass
class VAPOConfig(PPOConfig):
    """
    [`PPOConfig`] with the defaults of the VAPO paper: a critic with its own weights that learns twice as fast as the
    policy (2e-6 and 1e-6) and, for 50 optimizer steps, alone; λ 1 for the critic and by length, with α 0.05, for the
    policy; clip range 0.2/0.28; groups of 16; 0.1 times the negative log-likelihood of correct completions; a loss
    that is divided by the number of tokens of the optimizer step; 16 optimizer steps for each generation batch (in the
    paper, 512 prompts × 16 completions in mini-batches of 512); no KL to the reference.

    The paper starts the critic from a reward model: pass it as `value_model`, or set `critic_init="reward"` if it is
    the `reward_model`. What the paper doesn't say: values are not clipped here, the learning rate's warm-up has
    DAPO's 20 steps, and advantages are whitened, as in [`PPOConfig`].
    """

    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt."})
    num_iterations: int = field(default=1, metadata={"help": "Epochs on each generation batch."})
    critic: str = field(
        default="model", metadata={"help": "A 'head' on the policy's hidden state, or a 'model' of its own."}
    )
    critic_warmup_steps: int = field(
        default=50,
        metadata={"help": "Optimizer steps at the start that move only the critic, towards Monte-Carlo returns."},
    )
    critic_lam: float | None = field(default=1.0, metadata={"help": "Lambda of the critic's targets."})
    lam_alpha: float | None = field(default=0.05, metadata={"help": "Alpha of the policy's length-adaptive lambda."})
    cliprange_value: float | None = field(default=None, metadata={"help": "Clip range of values. None: no clipping."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range."})
    loss_type: str = field(default="dapo", metadata={"help": "Token-level loss."})
    token_normalization: str | None = field(
        default=None,
        metadata={
            "help": "None: 'mini_batch' if the loss divides by a number of tokens and a generation batch has whole "
            "optimizer steps; else 'generation_batch'."
        },
    )
    positive_nll_coef: float = field(
        default=0.1, metadata={"help": "Weight of the negative log-likelihood of completions that solve their prompt."}
    )
    kl_coef: float | None = field(default=0.0, metadata={"help": "No KL term."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the policy."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=20, metadata={"help": "Optimizer steps of linear warm-up."})

    _updates_per_generation: ClassVar[int | None] = 16
    _critic_rate_factor: ClassVar[float] = 2.0


class VAPOTrainer(PPOTrainer):
    """[`PPOTrainer`] with the defaults of VAPO, see [`VAPOConfig`]."""

    config_class = VAPOConfig
    _tag_names = ["trl", "trl_ext", "vapo"]
    _name = "VAPO"
    _paper = {
        "title": "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks",
        "id": "2504.05118",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{yue2025vapo,
                title        = {{VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks}},
                author       = {Yu Yue and others},
                year         = 2025,
                eprint       = {arXiv:2504.05118},
            }"""),
    }
