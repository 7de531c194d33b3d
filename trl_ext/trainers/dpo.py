"""
DPO: Direct Preference Optimization (https://huggingface.co/papers/2305.18290).

The policy is its own reward model: r(x, y) = β·log π(y|x)/π_ref(y|x), up to a term that depends on the prompt alone
(eq. 5). The loss is −log σ of the difference of that reward between the chosen and the rejected completion (eq. 7).

The loss, its variants, the data and the reference are TRL's. Added here are a curriculum, which every trainer of
`trl_ext` takes, and the implicit reward as a reward function for the trainer that comes next. TRL logs the share of
pairs whose chosen completion has the higher implicit reward as `rewards/accuracies`, and as `eval_rewards/accuracies`
in evaluation. A tie counts as wrong, so that a policy that still equals its reference is at 0 and not at ½.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, Self

import torch
import trl
from datasets import Dataset

from ..errors import require, require_one_of
from ..redaction import hidden_tokens
from ..rewards.implicit import IMPLICIT_REWARD, ImplicitReward
from ..roles.roles import Roles
from ..roles.trunk import REFERENCE_ADAPTER
from ..rollouts.pair_dealing import PAIR_MEAN_LOSSES, SORTING_LOSSES, WHOLE_BATCH_LOSSES
from .arguments import adopted, bound
from .cards import CardAdditions, complete_card
from .config_checks import check_types
from .pair_checks import check_all_pairs, check_loaded_pairs, check_weights
from .references import check_reference
from .roles import roles_of
from .seams.dpo import DPOSeams, RowOrder
from .seams.prefixes import sharing_wanted


class PairOrder(Protocol):
    """What [`DPOTrainer`] needs of a curriculum. [`~trl_ext.curriculum.schedule.DifficultyCurriculum`] has it."""

    column: str | None
    start_completion_length: int | None

    def priors(self, values: Sequence[float | None]) -> list[float]:
        """Difficulties in [0, 1] of rows, from the numbers that the column holds for all of them."""

    def epoch_order(self, difficulties: Sequence[float], seed: int, epoch: int) -> list[int]:
        """The rows of a data set in the order in which an epoch trains on them, each once."""


# Losses that TRL's trainer knows
LOSS_TYPES = PAIR_MEAN_LOSSES + WHOLE_BATCH_LOSSES
# Losses that read `label_smoothing`
SMOOTHED_LOSSES = ("robust", "exo_pair", *SORTING_LOSSES)


def prompts_together(prompts: Sequence[Any], seed: int, epoch: int) -> list[int]:
    """Rows in a random order of their prompts; the rows of a prompt follow each other, in a random order, too."""
    generator = torch.Generator().manual_seed(seed + epoch)
    rows: dict[str, list[int]] = {}
    for row in torch.randperm(len(prompts), generator=generator).tolist():
        rows.setdefault(repr(prompts[row]), []).append(row)
    return [row for of_prompt in rows.values() for row in of_prompt]


@dataclass
class DPOConfig(trl.DPOConfig):
    """
    [`~trl.DPOConfig`] with [`adopt`] and three arguments more. Values that TRL would fail on later, and a
    `label_smoothing` without effect or out of its range, are refused before a model is loaded.

    Args:
        share_prefixes (`bool` or `str`, *optional*, defaults to `True`):
            Whether passes compute a prompt once for all completions of it in a micro-batch, and no padding, where the
            gradient is TRL's up to rounding and that is cheaper by an estimate. `"always"`: at any cost. `False`:
            TRL's passes.
        weight_column (`str`, *optional*):
            Column of `train_dataset` with the weight of each pair, a number of at least 0: the gradient is that of
            mean(weight · loss). TRL's logs, the loss among them, and evaluation know nothing of weights.
            [`~trl_ext.preferences.pairs.make_pairs`] writes the column `pair_weight`.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Whether an epoch trains on prompts in a random order, and on all pairs of a prompt one after the other, so
            that `share_prefixes` computes a completion once for all of its pairs in a micro-batch.

    Raises:
        TypeError: for text in place of a number, or one value in place of a list.
        ValueError: for an unknown loss or no `max_length`, or if no loss reads `label_smoothing`, or it is no
            probability below ½.
    """

    share_prefixes: Literal[True, False, "always"] = field(
        default=True,
        metadata={
            "help": "Whether passes compute a prompt once for all of its completions, where that is exact and "
            "cheaper: True, False, or always (at any cost)."
        },
    )

    weight_column: str | None = field(default=None, metadata={"help": "Column with the weights of pairs."})
    group_by_prompt: bool = field(
        default=False, metadata={"help": "Whether the pairs of a prompt follow each other, to be computed together."}
    )

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        for loss_type in self.loss_type:
            require_one_of("loss_type", loss_type, LOSS_TYPES)
        require(
            0 <= self.label_smoothing < 0.5,
            f"label_smoothing={self.label_smoothing} is the probability that a label is wrong, and must lie in "
            "[0, 0.5). A usual value is 0.1.",
        )
        require(
            self.label_smoothing == 0 or bool({*self.loss_type} & {*SMOOTHED_LOSSES}),
            f"label_smoothing={self.label_smoothing} has no effect with loss_type={self.loss_type}. Set "
            "loss_type='robust', which corrects for that share of wrong labels, or leave label_smoothing out.",
        )
        require(
            self.max_length is None or self.max_length >= 1,
            f"max_length={self.max_length} must be at least 1, or None for no limit.",
        )
        require(
            self.weight_column is None or not {*self.loss_type} & {*SORTING_LOSSES},
            f"loss_type={self.loss_type} compares sorted batches, in which a pair has no loss of its own to be "
            "weighed. Choose a different loss, or leave weight_column out.",
        )
        require(
            not self.group_by_prompt or self.train_sampling_strategy == "random",
            f"group_by_prompt and train_sampling_strategy={self.train_sampling_strategy!r} both set the order of the "
            "rows. Leave the second at 'random'.",
        )

    def to_dict(self) -> dict[str, Any]:
        """What is written into logs: without access tokens."""
        settings: dict[str, Any] = hidden_tokens(super().to_dict())
        return settings

    @classmethod
    def adopt(cls, args: trl.DPOConfig) -> Self:
        """
        Take over a configuration that was written for TRL. No default differs, so every argument keeps its value.

        Args:
            args ([`~trl.DPOConfig`]):
                A configuration of this class is returned as it is.

        Raises:
            TypeError: if it is a configuration of a different kind.
        """
        return adopted(cls, args, trl.DPOConfig)


class DPOTrainer(DPOSeams):
    """
    [`~trl.DPOTrainer`] that can train in the order of difficulty and hands out its implicit reward. Takes the same
    arguments; `args` may be a [`~trl.DPOConfig`], which [`DPOConfig.adopt`] takes over.

    Args:
        ref_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            The reference; by name, it is loaded as the policy would be.
        curriculum ([`~trl_ext.curriculum.schedule.DifficultyCurriculum`], *optional*):
            The order in which each epoch trains on the pairs, by the curriculum's column. `None`: TRL's order.

    Raises:
        ValueError: before a model is loaded, if the data set lacks the curriculum's column or the column can't be
            read, or if a setting contradicts the curriculum.
        TypeError: if `args` is not a configuration for DPO, or `curriculum` is a name or a class.
    """

    config_class = DPOConfig
    _tag_names = ["trl", "trl_ext", "dpo"]
    _name = "DPO"
    _paper = {
        "title": "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "id": "2305.18290",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{rafailov2023direct,
                title        = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
                author       = {Rafael Rafailov and others},
                year         = 2023,
                booktitle    = {Advances in Neural Information Processing Systems 36},
            }"""),
    }

    def __init__(self, *args: Any, curriculum: PairOrder | None = None, **kwargs: Any) -> None:
        given = bound(trl.DPOTrainer, self, args, kwargs)
        prompts = check_all_pairs(given)
        self._check_curriculum(given["args"], curriculum, given.get("train_dataset"))
        check_weights(given["args"], curriculum, given.get("train_dataset"))
        self.curriculum = curriculum
        self.card = CardAdditions()
        check_reference(given, given.get("ref_model"), wanted=True)
        super().__init__(**given)
        check_loaded_pairs(self, prompts)
        self.sharing = sharing_wanted(self, self.args.share_prefixes)[0]

    @property
    def roles(self) -> Roles:
        """Actor and reference, and on which weights they are."""
        return roles_of(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card with what is wrong in it put right, followed by what `self.card` adds."""
        super().create_model_card(*args, **kwargs)
        complete_card(self, self.card)

    @staticmethod
    def _check_curriculum(config: DPOConfig, curriculum: Any, dataset: Any) -> None:
        if curriculum is None:
            return
        if isinstance(curriculum, type) or not hasattr(curriculum, "epoch_order"):
            raise TypeError(f"curriculum={curriculum!r} is not a curriculum. Pass a DifficultyCurriculum(...).")
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "curriculum orders the rows of train_dataset, which must be a datasets.Dataset, not "
                f"{type(dataset).__name__}. Load it without streaming, or leave curriculum out."
            )
        column = curriculum.column
        require(
            column is not None and column in dataset.column_names,
            f"The curriculum's column is {column!r}, and train_dataset has {dataset.column_names}. DPO has no "
            "rollouts. Name a column that says how hard each pair is.",
        )
        require(
            curriculum.start_completion_length is None,
            f"start_completion_length={curriculum.start_completion_length} has no effect in DPO, which generates "
            "nothing. Leave it out.",
        )
        require(
            config.train_sampling_strategy == "random",
            f"curriculum and train_sampling_strategy={config.train_sampling_strategy!r} both set the order of the "
            "rows. Leave the second at 'random'.",
        )
        curriculum.priors(dataset[column][:])

    def row_order(self) -> RowOrder | None:
        if self.curriculum is None:
            if not self.args.group_by_prompt:
                return None
            tokenized = "prompt_ids" in self.train_dataset.column_names  # unless there are images
            return partial(
                prompts_together, self.train_dataset["prompt_ids" if tokenized else "prompt"], self._order_seed
            )
        # Read again, because TRL has dropped the rows whose prompt is too long
        difficulties = self.curriculum.priors(self.train_dataset[self.curriculum.column][:])
        return partial(self.curriculum.epoch_order, difficulties, self._order_seed)

    @property
    def _order_seed(self) -> int:
        seed: int = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return seed

    def implicit_reward(
        self,
        batch_size: int = 8,
        by_token: bool = False,
        snapshot: bool = True,
        name: str = IMPLICIT_REWARD,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> ImplicitReward:
        """
        The reward that this policy has learned, β·log π(y|x)/π_ref(y|x), as a reward function for any trainer. β and
        the reference are this trainer's.

        Args:
            batch_size (`int`, *optional*, defaults to `8`):
                Completions per forward pass.
            by_token (`bool`, *optional*, defaults to `False`):
                Return one reward per token instead of one per completion.
            snapshot (`bool`, *optional*, defaults to `True`):
                Copy the trained weights as they are now, so that the reward stays the same while the model is trained
                further. For an adapter, the adapter is copied and the base model is shared; without an adapter, the
                whole model is copied. `False`: the reward follows the policy.
            name (`str`, *optional*, defaults to `"implicit_reward"`):
                The reward's name in logs.
            chat_template_kwargs (`dict`, *optional*):
                Further arguments of the chat template: those of the trainer that uses the reward.

        Raises:
            ValueError: if there is no reference model (`precompute_ref_log_probs` without an adapter), or if the
                weights are sharded over processes.
        """
        unwrap: Any = self.accelerator.unwrap_model
        policy, reference = unwrap(self.model), None if self.ref_model is None else unwrap(self.ref_model)
        # For a policy that came with an adapter, TRL keeps a copy of that adapter as it was
        has_copy = reference is None and REFERENCE_ADAPTER in getattr(policy, "peft_config", {})
        return ImplicitReward(
            policy,
            reference,
            self.beta,
            self.processing_class,
            batch_size=batch_size,
            by_token=by_token,
            reference_adapter=REFERENCE_ADAPTER if has_copy else None,
            snapshot=snapshot,
            chat_template_kwargs=chat_template_kwargs,
            name=name,
        )
