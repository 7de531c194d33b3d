"""
The reward that a policy trained by DPO has learned, as a reward function: r(x, y) = β·log π(y|x)/π_ref(y|x)
(https://huggingface.co/papers/2305.18290, eq. 5), without the term β·log Z(x), which no difference of two completions
of a prompt, and no group-relative advantage, depends on.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from trl.data_utils import _tokenize
from trl.trainer.utils import use_adapter

from ..rollouts.prompts import TokenizedPrompt


@contextmanager
def _as_found(*models: nn.Module) -> Iterator[None]:
    """In evaluation mode inside; afterwards, modes and what is trainable are what they were, module by module."""
    modules = [(module, module.training) for model in models for module in model.modules()]
    trainable = [(weight, weight.requires_grad) for model in models for weight in model.parameters()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modules:
            module.training = training
        for weight, required in trainable:  # PEFT decides anew with every change of adapters
            if weight.requires_grad != required:
                weight.requires_grad_(required)


def _copy(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(weight, "ds_id") or isinstance(weight, DTensor):
        raise ValueError(
            "snapshot=True, but the weights are spread over processes (ZeRO-3, FSDP), so that none of them has all to "
            "copy. Save the policy, load it as a model of its own, and pass that one."
        )
    return weight.detach().clone()


class ImplicitReward:
    """
    β·log π(y|x)/π_ref(y|x) as a reward function for every trainer: called with `prompts`, `completions` and
    `completion_ids` as TRL calls it, for plain and conversational prompts, and prompts that are token ids. Text only.

    Nothing is trained by it: no gradient, dropout off, and the models are left in the mode they were found in. It is
    at temperature 1, as DPO is, whatever the temperature of sampling. All ids of a completion count, also those that a
    tool wrote.

    Whether it can change while a trainer goes on with the same weights is what `snapshot` says. With a snapshot, the
    forward runs on copies, made here, of every weight that is trainable or belongs to one of the two adapters
    (`torch.func.functional_call`: the model keeps its own, and gets no further adapter that a checkpoint would have to
    hold). Every other weight is shared, and was frozen when the copies were made; each call makes sure that it still
    is. A `reference` of its own is not copied: nobody may train it.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            π. Of a PEFT model, with the adapter that is active now.
        reference ([`~transformers.PreTrainedModel`] or `None`):
            π_ref. `None` with a PEFT model: the same model with its adapter switched off, or with `reference_adapter`.
        beta (`float`):
            β, in reward per nat.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Turns prompts into ids, conversations by its chat template, as DPO's data were.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions of a forward. Those of like length go together.
        by_token (`bool`, *optional*, defaults to `False`):
            Return a list for each completion, with a reward a token. They add up to the completion's reward.
        reference_adapter (`str`, *optional*):
            Adapter of the policy that is the reference.
        snapshot (`bool`, *optional*, defaults to `False`):
            Keep the weights as they are now. `False`: with a policy that is trained on, the reward moves along.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.
        name (`str`, *optional*, defaults to `"implicit_reward"`):
            In logs.

    Raises:
        ValueError: if there is no reference, there are several active adapters, or a snapshot is asked for of weights
            that are spread over processes (ZeRO-3, FSDP) or of two adapters that differ in more than weights.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any | None,
        beta: float,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        by_token: bool = False,
        reference_adapter: str | None = None,
        snapshot: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        name: str = "implicit_reward",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, but it must be at least 1.")
        self.policy: Any = getattr(policy, "module", policy)
        self.reference: Any = getattr(reference, "module", reference)
        self.has_adapter = is_peft_model(self.policy)
        if self.reference is None and not self.has_adapter:
            raise ValueError(
                "`reference` is None, and the policy has no adapter to switch off. Pass the model that DPO started "
                "from."
            )
        if self.reference is self.policy:
            raise ValueError("`policy` and `reference` are the same object: the reward would be 0 everywhere.")
        adapters = list(self.policy.active_adapters) if self.has_adapter else []
        if len(adapters) > 1:
            raise ValueError(f"The policy has several active adapters, {adapters}. Activate the one that was trained.")
        if reference_adapter is not None and reference_adapter not in getattr(self.policy, "peft_config", {}):
            raise ValueError(f"The policy has no adapter {reference_adapter!r}.")
        self.adapter = adapters[0] if adapters else None
        self.reference_adapter = reference_adapter
        self.beta = beta
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.by_token = by_token
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.__name__ = name
        self._thread = threading.get_ident()
        self._kept: dict[str, torch.Tensor] | None = None
        self._kept_reference: dict[str, torch.Tensor] | None = None
        if snapshot:
            self._keep_weights()

    def _keep_weights(self) -> None:
        others = set(getattr(self.policy, "peft_config", {})) - {self.adapter}  # of no account for the policy
        weights = {key: w for key, w in self.policy.named_parameters() if not others.intersection(key.split("."))}
        self._kept = {
            key: _copy(weight)
            for key, weight in weights.items()
            if weight.requires_grad or self.adapter in key.split(".")
        }
        self._shared = [key for key in weights if key not in self._kept]
        self._kept_reference = self._kept
        if self.reference_adapter is not None:
            # In the places of the policy's adapter, so that the reference's may be deleted, or become something else
            mine, other = (self.policy.peft_config[name] for name in (self.adapter, self.reference_adapter))
            if {**mine.to_dict(), "inference_mode": None} != {**other.to_dict(), "inference_mode": None}:
                raise ValueError(
                    f"snapshot=True needs adapters of one configuration, and {self.adapter!r} has another than "
                    f"{self.reference_adapter!r}. Load the reference as a model of its own."
                )
            of_policy, of_reference = f".{self.adapter}.", f".{self.reference_adapter}."
            began = {key.replace(of_policy, of_reference): key for key in weights if of_policy in key}
            self._kept_reference = dict(self._kept)
            for key, weight in self.policy.named_parameters():
                if key in began:
                    self._kept_reference[began[key]] = _copy(weight)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float] | list[list[float]]:
        """
        Score completions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                One for each completion.
            completions (`list`):
                Not read: the ids are.
            completion_ids (`list[list[int]]`):
                Token ids of each completion.

        Returns:
            `list[float]`, or with `by_token` `list[list[float]]`, one for each completion.

        Raises:
            ValueError: if a prompt has no tokens, because the first token of its completion has no probability then.
            RuntimeError: if weights that the snapshot shares have become trainable, or adapters would have to be
                changed from another thread than the one that made this object.
        """
        self._check()
        rows = [(self._ids(prompt), list(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        if any(not prompt for prompt, _ in rows):
            raise ValueError("a prompt has no tokens. Give it at least one, such as the tokenizer's bos token.")
        rewards: list[list[float]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
        models = [model for model in (self.policy, self.reference) if model is not None]
        with torch.no_grad(), _as_found(*models):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for row, logratios in zip(batch, self._log_ratios([rows[row] for row in batch]), strict=True):
                    rewards[row] = (self.beta * logratios.double()).tolist()
        return rewards if self.by_token else [sum(reward) for reward in rewards]

    def _check(self) -> None:
        if (self.has_adapter or self._kept is not None) and threading.get_ident() != self._thread:
            raise RuntimeError(
                f"{self.__name__} shares its model with whatever runs in the thread that made it, and would change "
                "adapters under its feet. Leave rewards_in_flight off, or give it a policy and a reference of its own."
            )
        if self._kept is not None:
            weights = dict(self.policy.named_parameters())
            gone = [key for key in (*self._kept, *self._shared) if key not in weights]
            moving = [key for key in self._shared if key in weights and weights[key].requires_grad]
            if gone or moving:
                raise RuntimeError(
                    f"{self.__name__} shares weights with a policy "
                    + (f"that has lost {gone[0]!r}" if gone else f"whose {moving[0]!r} is trained now")
                    + ": it would not be the reward that it was. Make it of a model of its own."
                )

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, TokenizedPrompt):
            return prompt.input_ids
        kwargs = {} if isinstance(prompt, str) else {"add_generation_prompt": True, **self.chat_template_kwargs}
        return list(_tokenize(self.tokenizer, prompt, **kwargs)["input_ids"])

    def _log_ratios(self, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """log π/π_ref of each token of each completion."""
        if self.has_adapter:
            with use_adapter(self.policy, self.adapter):
                policy = self._logps(self.policy, self._kept, rows)
        else:
            policy = self._logps(self.policy, self._kept, rows)
        if self.reference is not None:
            reference = self._logps(self.reference, None, rows)
        else:
            in_its_place = self._kept is not None and self.reference_adapter is not None
            with use_adapter(self.policy, self.adapter if in_its_place else self.reference_adapter):
                reference = self._logps(self.policy, self._kept_reference, rows)
        return [mine - other for mine, other in zip(policy, reference, strict=True)]

    def _logps(
        self, model: Any, weights: dict[str, torch.Tensor] | None, rows: list[tuple[list[int], list[int]]]
    ) -> list[torch.Tensor]:
        """Log-probabilities of the completions' tokens, in float32 on the CPU."""
        device = next(model.parameters()).device
        longest = max(len(prompt) + len(ids) for prompt, ids in rows)
        padding = [longest - len(prompt) - len(ids) for prompt, ids in rows]
        # On the right, where it moves no position; what fills it is masked
        filled = [[*prompt, *ids, *[0] * pads] for (prompt, ids), pads in zip(rows, padding, strict=True)]
        masks = [[1] * (longest - pads) + [0] * pads for pads in padding]
        first = min(len(prompt) for prompt, _ in rows) - 1  # the logits before are of prompts
        inputs = {
            "input_ids": torch.tensor(filled, device=device),
            "attention_mask": torch.tensor(masks, device=device),
            "use_cache": False,
            "logits_to_keep": longest - first,
        }
        outputs = model(**inputs) if weights is None else functional_call(model, weights, (), inputs)
        logps = []
        for (prompt, ids), logits in zip(rows, outputs.logits[:, first - longest :], strict=True):  # (T, V)
            start = len(prompt) - 1 - first
            tokens = torch.tensor(ids, device=device, dtype=torch.long).unsqueeze(1)
            found = logits[start : start + len(ids)].float().log_softmax(dim=1).gather(1, tokens).squeeze(1)
            logps.append(found.cpu())
        return logps
