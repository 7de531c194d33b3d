"""
GSPO: Group Sequence Policy Optimization (https://huggingface.co/papers/2507.18071).

There is one importance ratio for each sequence, s_i = exp(mean_t(logp_t − logp_old_t)) (eq. 7), which is clipped as a
whole. The loss is a mean over sequences (eq. 5). In GSPO-token (eq. 13, 14) every token of a sequence has that ratio,
but an advantage of its own: `importance_sampling_level="sequence_token"`. If all tokens of a sequence have the same
advantage, GSPO and GSPO-token are equal in value and gradient.

It assumes several optimizer steps for each generation batch: with one step, every ratio is 1.
"""

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from .grpo import GRPOTrainer
from .grpo_config import GRPOConfig


@dataclass
class GSPOConfig(GRPOConfig):
    """
    [`GRPOConfig`] with the defaults of the GSPO paper: sequence ratios clipped to [1 − 3e-4, 1 + 4e-4], a loss that is
    averaged over sequences, and four optimizer steps for each generation batch.
    """

    importance_sampling_level: str = field(
        default="sequence",
        metadata={"help": "'sequence' (GSPO) or 'sequence_token' (GSPO-token)."},
    )
    epsilon: float | None = field(default=3e-4, metadata={"help": "Lower clip range."})
    epsilon_high: float | None = field(default=4e-4, metadata={"help": "Upper clip range."})
    loss_type: str = field(default="grpo", metadata={"help": "Mean over sequences."})
    beta: float = field(default=0.0, metadata={"help": "No KL term."})

    _updates_per_generation: ClassVar[int | None] = 4


class GSPOTrainer(GRPOTrainer):
    """[`GRPOTrainer`] with the defaults of GSPO, see [`GSPOConfig`]."""

    config_class = GSPOConfig
    _tag_names = ["trl", "trl_ext", "gspo"]
    _name = "GSPO"
    _paper = {
        "title": "Group Sequence Policy Optimization",
        "id": "2507.18071",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zheng2025gspo,
                title        = {{Group Sequence Policy Optimization}},
                author       = {Chujie Zheng and others},
                year         = 2025,
                eprint       = {arXiv:2507.18071},
            }"""),
    }
