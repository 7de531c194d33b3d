"""TRL's own trainers of the recipes `sft` and `reward`, with cards whose faults are put right."""

from typing import Any

import trl

from ..trainers.cards import CardAdditions, complete_card


class SFTTrainer(trl.SFTTrainer):
    """[`~trl.SFTTrainer`]; `card` is what the model card adds to TRL's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card = CardAdditions()
        super().__init__(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        complete_card(self, self.card)


class RewardTrainer(trl.RewardTrainer):
    """[`~trl.RewardTrainer`]; `card` is what the model card adds to TRL's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card = CardAdditions()
        super().__init__(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        complete_card(self, self.card)
