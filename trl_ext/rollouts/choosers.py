"""
Two protocols that trainers call: [`RolloutObserver`] sees the rollouts of a run, [`PromptChooser`] also chooses its
prompts.

Trainers call their methods on every rank with the same arguments, in the order of the run, and in training only. All
ranks therefore decide alike, and a resumed run decides as the uninterrupted one would. A trainer keeps its observers
in `trainer.observers`; the first of them is its prompt chooser.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch

from .generation_batch import GenerationBatch
from .prompt_features import Reader


class RolloutObserver:
    """
    Sees every generation batch of training. The methods do nothing here: a subclass overrides those that it needs.

    Attributes:
        key (`str`):
            Key of the observer's state in checkpoints. Empty: the observer has no state.
    """

    key: ClassVar[str] = ""

    def begin(self, trainer: Any) -> None:
        """Called when a generation batch begins, before its prompts are chosen."""

    def observe(self, rows: Sequence[dict[str, Any]], outcomes: torch.Tensor, live: list[bool]) -> None:
        """
        Called once for each round of generation, when its groups have been scored.

        Args:
            rows (`list[dict]`):
                Data set rows of all ranks, one for each group. For the first round of a batch the list is empty,
                unless the trainer's chooser needs the rows ([`PromptChooser.needs_rows`]).
            outcomes (`torch.Tensor` of shape `(P, G)`):
                Outcome rewards by group, NaN = not applicable.
            live (`list[bool]`):
                For each group, whether its rewards differ.
        """

    def end(self, trainer: Any, batch: GenerationBatch) -> None:
        """
        Called when a generation batch is ready to be trained on. TRL's metrics of it are in `trainer.train_metrics`.

        Args:
            trainer ([`~trl_ext.GRPOTrainer`]):
                The trainer.
            batch ([`~trl_ext.rollouts.generation_batch.GenerationBatch`]):
                The generation batch.
        """

    def closing_metrics(self) -> dict[str, float]:
        """What is logged once, when training ends. Called on every rank."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """
        The state that a checkpoint must hold. It doesn't change when the observer is called again. It is asked for,
        and copied, at every optimizer step: what is known of each prompt belongs into a
        [`~trl_ext.rollouts.ledger.Ledger`].
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of [`state_dict`]."""


class PromptChooser(RolloutObserver):
    """
    Chooses the prompts for which completions are generated. This one doesn't look at them: it takes the prompts that
    the loader deals, and for refilling the next ones of a shuffled stream.

    Attributes:
        lookahead (`int`):
            Number of candidates for each prompt that is chosen. 1: there is no choice.
    """

    lookahead: int = 1

    @property
    def needs_rows(self) -> bool:
        """Whether the chooser needs the data set rows of all ranks."""
        return self.lookahead > 1

    def prepared(self, dataset: Any, config: Any) -> Self:
        """
        The chooser of one run: a copy that knows the data set and the settings. The user's own object is not changed.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                The training set.
            config ([`~trl_ext.GRPOConfig`]):
                The trainer's settings.

        Raises:
            ValueError: if the chooser can't work with them.
        """
        return self

    def read_prompts(self, read: Reader) -> None:
        """
        Called once, before training, if the policy can read prompts for a chooser that wants to know more of them.

        Args:
            read (`Reader`):
                Returns features of prompts, see [`~trl_ext.rollouts.prompt_features.Reader`].
        """

    def choose(self, rows: Sequence[dict[str, Any]], count: int, progress: float = 0.0, dealt: int = 0) -> list[int]:
        """
        Choose the prompts for which completions are generated.

        Args:
            rows (`list[dict]`):
                Data set rows of the candidates.
            count (`int`):
                Number of prompts to choose.
            progress (`float`, *optional*, defaults to `0.0`):
                Share of the run that is over, in [0, 1].
            dealt (`int`, *optional*, defaults to `0`):
                How many candidates, from the first on, were dealt by the loader. 0: the choice is for a further round.

        Returns:
            `list[int]`: positions in `rows`, ascending. A prompt whose position comes k times gets k times as many
            completions, see [`trl_ext.rollouts.groups`].
        """
        return list(range(min(count, len(rows))))

    def completion_length(self, longest: int, progress: float) -> int:
        """
        Longest completion that may be generated now.

        Args:
            longest (`int`):
                The trainer's `max_completion_length`, in tokens.
            progress (`float`):
                Share of the run that is over, in [0, 1].

        Returns:
            `int`: tokens.
        """
        return longest
