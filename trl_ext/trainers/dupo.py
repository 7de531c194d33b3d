"""
DUPO: Duplicating Sampling Policy Optimization, from WebSailor (https://huggingface.co/papers/2507.02592, section 4.2).

It has DAPO's objective, but groups without reward variance are replaced by random copies of other groups of the same
batch instead of groups of new prompts. This is made for agents, whose rollouts are long and slow. Before training,
prompts that all rollouts solve are dropped, see [`trl_ext.curriculum.difficulty`]. Tokens that an environment wrote
are not in the loss (TRL's `tool_mask`).

It assumes that most batches have at least one group with variance.
"""

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from .grpo import GRPOTrainer
from .grpo_config import GRPOConfig


@dataclass
class DUPOConfig(GRPOConfig):
    """
    [`GRPOConfig`] with the defaults of the DUPO paper: copies in place of dead groups, DAPO's clip range and
    token-level loss, groups of 8 at temperature 1, learning rate 1e-6, and four optimizer steps for each generation
    batch (in the paper, batches of 128 in mini-batches of 32).
    """

    rollout_selection: str = field(
        default="duplicate", metadata={"help": "'duplicate' replaces dead groups by copies of live ones."}
    )
    num_generations: int | None = field(default=8, metadata={"help": "Completions per prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
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

    _updates_per_generation: ClassVar[int | None] = 4


class DUPOTrainer(GRPOTrainer):
    """[`GRPOTrainer`] with the defaults of DUPO, see [`DUPOConfig`]."""

    config_class = DUPOConfig
    _tag_names = ["trl", "trl_ext", "dupo"]
    _name = "DUPO"
    _paper = {
        "title": "WebSailor: Navigating Super-human Reasoning for Web Agent",
        "id": "2507.02592",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{li2025websailor,
                title        = {{WebSailor: Navigating Super-human Reasoning for Web Agent}},
                author       = {Kuan Li and others},
                year         = 2025,
                eprint       = {arXiv:2507.02592},
            }"""),
    }
