"""
DPO: Direct Preference Optimization (https://huggingface.co/papers/2305.18290).

The policy is its own reward model: r(x, y) = β·log π(y|x)/π_ref(y|x), up to a term of the prompt alone (eq. 5), and
the loss is −log σ of the difference of that reward between the chosen and the rejected completion (eq. 7).

The loss, its variants, the data and the reference are TRL's. Added: a curriculum, as all trainers here take one,
and the implicit reward as a reward function for whatever trains next. TRL logs the share of pairs whose chosen
completion has the higher implicit reward as `rewards/accuracies`, in evaluation as `eval_rewards/accuracies`. A tie
counts as wrong: a policy that still equals its reference is at 0, not at ½.
"""

import inspect
import textwrap
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import trl
from datasets import Dataset
from trl.trainer.utils import get_config_model_id

from ..rewards.implicit import ImplicitReward
from .seams.dpo import DPOSeams, RowOrder


@dataclass
class DPOConfig(trl.DPOConfig):
    """[`~trl.DPOConfig`], to which it adds nothing but [`adopt`]."""

    @classmethod
    def adopt(cls, args: trl.DPOConfig) -> Self:
        """
        Take over a configuration written for TRL, as it is: nothing here has another default.

        Args:
            args ([`~trl.DPOConfig`]):
                A configuration of this class is returned as it is.

        Raises:
            TypeError: if it is another kind of configuration.
        """
        if isinstance(args, cls):
            return args
        if not isinstance(args, trl.DPOConfig):
            raise TypeError(f"`args` must be a {cls.__name__} or a trl.DPOConfig, not {type(args).__name__}.")
        own = {f.name for f in fields(cls)}
        adopted = cls(**{f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in own})
        for f in fields(args):  # what a user's own subclass adds
            if f.name not in own:
                setattr(adopted, f.name, getattr(args, f.name))
        return adopted


class DPOTrainer(DPOSeams):
    """
    [`~trl.DPOTrainer`] with an order of training by difficulty and the implicit reward. Takes the same arguments;
    `args` may be a [`~trl.DPOConfig`], which [`DPOConfig.adopt`] takes over.

    Args:
        curriculum ([`~trl_ext.curriculum.schedule.DifficultyCurriculum`], *optional*):
            In which order pairs are trained on, in every epoch, by its column. `None`: TRL's order.

    Raises:
        ValueError: before a model is loaded, if the curriculum has no column that can be read.
        TypeError: if `args` is not a configuration for DPO.
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

    def __init__(self, *args: Any, curriculum: Any = None, **kwargs: Any) -> None:
        given = inspect.signature(trl.DPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        given.pop("self")
        if given.get("args") is None:
            model = given["model"]
            identifier = model if isinstance(model, str) else get_config_model_id(model.config)
            given["args"] = self.config_class(f"{identifier.split('/')[-1]}-{self._name}")
        config = given["args"] = self.config_class.adopt(given["args"])
        self._check_curriculum(config, curriculum, given.get("train_dataset"))
        self.curriculum = curriculum
        super().__init__(**given)

    @staticmethod
    def _check_curriculum(config: DPOConfig, curriculum: Any, dataset: Any) -> None:
        if curriculum is None:
            return
        if isinstance(curriculum, str | type):
            raise TypeError(f"curriculum={curriculum!r} is no object. Pass a DifficultyCurriculum(...).")
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "curriculum orders the rows of train_dataset, which must be there as a whole, not as a "
                f"{type(dataset).__name__}. Load it without streaming, or leave curriculum out."
            )
        column = curriculum.column
        if column is None or column not in dataset.column_names:
            raise ValueError(
                f"The curriculum's column is {column!r}, and train_dataset has {dataset.column_names}. DPO has no "
                "rollouts: name a column that says how hard each pair is."
            )
        if curriculum.start_completion_length is not None:
            raise ValueError(
                f"start_completion_length={curriculum.start_completion_length} means nothing to DPO, which generates "
                "nothing. Leave it out."
            )
        if config.train_sampling_strategy != "random":
            raise ValueError(
                f"curriculum and train_sampling_strategy={config.train_sampling_strategy!r} both say in which order "
                "rows are trained on. Leave the second at 'random'."
            )
        curriculum.priors(dataset[column])

    def row_order(self) -> RowOrder | None:
        if self.curriculum is None:
            return None
        # Read again, because TRL drops rows whose prompt is too long
        difficulties = self.curriculum.priors(self.train_dataset[self.curriculum.column])
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return partial(self.curriculum.epoch_order, difficulties, seed)

    def implicit_reward(
        self,
        batch_size: int = 8,
        by_token: bool = False,
        snapshot: bool = True,
        name: str = "implicit_reward",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> ImplicitReward:
        """
        The reward that this policy has learned, β·log π(y|x)/π_ref(y|x), as a reward function for any trainer, with
        the `beta` and the reference of this one.

        Args:
            batch_size (`int`, *optional*, defaults to `8`):
                Completions of a forward.
            by_token (`bool`, *optional*, defaults to `False`):
                One reward a token instead of one a completion.
            snapshot (`bool`, *optional*, defaults to `True`):
                Keep the weights that are trained as they are now, so that the reward stays the same while the same
                model is trained on. For an adapter that is a copy of the adapter; the base model is shared. Without
                an adapter it is a copy of the whole model. `False`: the reward follows the policy.
            name (`str`, *optional*, defaults to `"implicit_reward"`):
                In logs.
            chat_template_kwargs (`dict`, *optional*):
                Further arguments of the chat template: those of the trainer that it rewards.

        Raises:
            ValueError: where there is no reference to ask (`precompute_ref_log_probs` without an adapter), or the
                weights are spread over processes.
        """
        unwrap: Any = self.accelerator.unwrap_model
        policy, reference = unwrap(self.model), None if self.ref_model is None else unwrap(self.ref_model)
        # Where an adapter was given, TRL keeps a copy of how it began
        began = "ref" if reference is None and "ref" in getattr(policy, "peft_config", {}) else None
        return ImplicitReward(
            policy,
            reference,
            self.beta,
            self.processing_class,
            batch_size=batch_size,
            by_token=by_token,
            reference_adapter=began,
            snapshot=snapshot,
            chat_template_kwargs=chat_template_kwargs,
            name=name,
        )
