"""
A reward model that scores token ids, for data that is tokenised already and a policy with the reward model's
tokenizer: nothing is decoded and tokenised again.
"""

from typing import Any

import torch

from ..errors import require
from ..rollouts.prompts import TokenizedPrompt


class RewardModelOnIds:
    """
    A reward function: the score that a sequence classification model with one output gives to the last token.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The reward model, on this process's device.
        name (`str`):
            The reward's name in logs.
        pad_token_id (`int`):
            The id of padding, which is masked.
        batch_size (`int`):
            Rows per forward pass.

    Raises:
        ValueError: for a model without a layer `score`.
    """

    def __init__(self, model: Any, name: str, pad_token_id: int, batch_size: int) -> None:
        require(
            hasattr(model, "score"),
            f"{type(model).__name__} has no layer `score`, with which causal models score the last token. Use the "
            "sequence classifier of a causal model, or pass the prompts as text, in a column `prompt`.",
        )
        self.model = model
        self.__name__ = name
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[TokenizedPrompt], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        ids = [prompt.input_ids + completion for prompt, completion in zip(prompts, completion_ids, strict=True)]
        # Rows of similar length are batched together
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        scores = [0.0] * len(ids)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, score in zip(rows, self._scores([ids[row] for row in rows]), strict=True):
                scores[row] = score
        return scores

    def _scores(self, ids: list[list[int]]) -> list[float]:
        longest = max(map(len, ids))
        device = next(self.model.parameters()).device
        padded = torch.tensor([row + [self.pad_token_id] * (longest - len(row)) for row in ids], device=device)
        lengths = torch.tensor([len(row) for row in ids], device=device)
        mask = (torch.arange(longest, device=device) < lengths.unsqueeze(1)).long()
        model: Any = getattr(self.model, "module", self.model)
        hidden = model.base_model(padded, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=device), lengths - 1]
        found: list[float] = model.score(last).squeeze(-1).float().tolist()
        return found
