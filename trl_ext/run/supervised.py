"""
TRL's own trainers of the recipes `sft` and `reward`, with cards whose faults are put right. A reward model's accuracy
on held-out pairs is that of all of them, see [`~trl_ext.trainers.seams.evaluation`].
"""

from typing import Any

import trl

from ..roles.quantized import keep_head_in_float32, keep_weights_trainable
from ..roles.reward_adapter import HEADS
from ..trainers.cards import CardAdditions, complete_card
from ..trainers.seams.evaluation import EvaluatedBatch, WholeEvaluations
from ..trainers.seams.pushes import creation_of_repository
from ..trainers.seams.quantized import SavesQuantization


class SFTTrainer(trl.SFTTrainer):
    """[`~trl.SFTTrainer`]; `card` is what the model card adds to TRL's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card = CardAdditions()
        super().__init__(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        complete_card(self, self.card)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with creation_of_repository(self):
            super().init_hf_repo(*args, **kwargs)


class RewardTrainer(SavesQuantization, WholeEvaluations, trl.RewardTrainer):
    """[`~trl.RewardTrainer`]; `card` is what the model card adds to TRL's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card = CardAdditions()
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        keep_weights_trainable(model)
        keep_head_in_float32(model, HEADS)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        complete_card(self, self.card)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with creation_of_repository(self):
            super().init_hf_repo(*args, **kwargs)

    def pool_batches(self, values: dict[str, list[float]], batches: list[EvaluatedBatch]) -> dict[str, float | None]:
        return {"min_reward": min(values["min_reward"]), "max_reward": max(values["max_reward"])}
