"""
DAPO: An Open-Source LLM Reinforcement Learning System at Scale (https://huggingface.co/papers/2503.14476).

Compared with GRPO it clips asymmetrically (eq. 10, "clip-higher"), averages the loss over tokens (eq. 12), has no KL
term, punishes overlong completions softly (eq. 13), and trains only on groups whose completions are neither all right
nor all wrong. For that it draws new prompts until the batch is full ("dynamic sampling", eq. 11).

It assumes an outcome reward that differs between completions of a prompt, and a data set with more prompts than a
generation batch.
"""

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from .grpo import GRPOTrainer
from .grpo_config import GRPOConfig


@dataclass
class DAPOConfig(GRPOConfig):
    """
    [`GRPOConfig`] with the defaults of the DAPO paper: refilled batches, clip range 0.2/0.28, groups of 16,
    completions of up to 20,480 tokens with a punishment that grows over the last 4,096, learning rate 1e-6 after a
    warm-up of 20 steps, 16 optimizer steps for each generation batch, and a loss that is divided by the number of
    tokens of the optimizer step.

    The paper's batch has 512 prompts. The size of yours depends on `per_device_train_batch_size` and
    `gradient_accumulation_steps`. Overlong *filtering*, the paper's alternative to punishment, is TRL's
    `mask_truncated_completions=True`.
    """

    rollout_selection: str = field(default="refill", metadata={"help": "'refill' is dynamic sampling."})
    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt."})
    max_completion_length: int | None = field(default=20480, metadata={"help": "Maximum length of a completion."})
    soft_punish_cache: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens before max_completion_length over which the soft overlong punishment grows. "
            "None: a fifth of max_completion_length."
        },
    )
    epsilon: float | None = field(default=0.2, metadata={"help": "Lower clip range."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range."})
    loss_type: str = field(default="dapo", metadata={"help": "Token-level loss."})
    token_normalization: str | None = field(
        default=None,
        metadata={
            "help": "None: 'mini_batch', as in the DAPO paper, if the loss divides by a number of tokens and a "
            "generation batch has whole optimizer steps; else 'generation_batch'."
        },
    )
    beta: float = field(default=0.0, metadata={"help": "No KL term."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=20, metadata={"help": "Optimizer steps of linear warm-up."})

    _updates_per_generation: ClassVar[int | None] = 16


class DAPOTrainer(GRPOTrainer):
    """[`GRPOTrainer`] with the defaults of DAPO, see [`DAPOConfig`]."""

    config_class = DAPOConfig
    _tag_names = ["trl", "trl_ext", "dapo"]
    _name = "DAPO"
    _paper = {
        "title": "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "id": "2503.14476",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{yu2025dapo,
                title        = {{DAPO: An Open-Source LLM Reinforcement Learning System at Scale}},
                author       = {Qiying Yu and others},
                year         = 2025,
                eprint       = {arXiv:2503.14476},
            }"""),
    }
