"""
Who sees the rollouts of a run, and who chooses its prompts: the two protocols that trainers call.

Both are called on every rank with the same arguments, in the order of the run, and in training only, so that all ranks
decide alike and a resumed run decides as the uninterrupted one. A trainer keeps its observers in `trainer.observers`;
its prompt chooser is the first of them.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch

from .generation_batch import GenerationBatch


class RolloutObserver:
    """
    Sees every generation batch of training. Does nothing here: a subclass overrides what it needs.

    Attributes:
        key (`str`):
            Under which a checkpoint holds the state. Empty: there is none.
    """

    key: ClassVar[str] = ""

    def begin(self, trainer: Any) -> None:
        """A generation batch begins: no prompt has been chosen for it yet."""

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: list[bool]) -> None:
        """
        Groups have been scored. Called once for each round of generation.

        Args:
            rows (`list[dict]`):
                Data set rows of all ranks, one for each group. Empty where nothing of the trainer needs to know them
                (see [`PromptChooser.needs_rows`]).
            outcomes (`torch.Tensor` of shape `(P, G)`):
                Outcome rewards by group, NaN = not applicable.
            live (`list[bool]`):
                Which groups have reward variance.
        """

    def end(self, trainer: Any, batch: GenerationBatch) -> None:
        """
        A generation batch is ready to be trained on, and TRL's metrics of it are in `trainer.train_metrics`.

        Args:
            trainer ([`~trl_ext.GRPOTrainer`]):
                The trainer.
            batch ([`~trl_ext.rollouts.generation_batch.GenerationBatch`]):
                What it was made of.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold. Later calls leave the result alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""


class PromptChooser(RolloutObserver):
    """
    Chooses the prompts that are generated for. This one is blind: it takes the prompts that the loader deals, and to
    refill the next ones of a shuffled stream.

    Attributes:
        lookahead (`int`):
            Candidates for every prompt that is chosen. 1: there is nothing to choose from.
    """

    lookahead: int = 1

    @property
    def needs_rows(self) -> bool:
        """Whether rows have to be gathered from all ranks for it."""
        return self.lookahead > 1

    def prepared(self, dataset: Any, config: Any) -> Self:
        """
        The chooser of one run: a copy that knows the data set and the settings. What the user passed stays as it is.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                The training set.
            config ([`~trl_ext.GRPOConfig`]):
                The trainer's settings.

        Raises:
            ValueError: if the chooser can't work with them.
        """
        return self

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        """
        Choose the prompts to generate for.

        Args:
            rows (`list[dict]`):
                Candidates.
            count (`int`):
                How many to choose.
            progress (`float`, *optional*, defaults to `0.0`):
                Share of the run that is over, in [0, 1].
            dealt (`int`, *optional*, defaults to `0`):
                So many of the first candidates were dealt by the loader. 0: the choice is for a further round.

        Returns:
            `list[int]`: positions in `rows`, ascending.
        """
        return list(range(min(count, len(rows))))

    def completion_length(self, longest: int, progress: float) -> int:
        """Tokens that a completion may have now, where `longest` is the trainer's setting."""
        return longest
