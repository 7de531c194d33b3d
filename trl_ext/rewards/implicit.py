"""
The reward that a policy trained by DPO has learned, as a reward function: r(x, y) = β·log π(y|x)/π_ref(y|x)
(https://huggingface.co/papers/2305.18290, eq. 5). The term β·log Z(x) of that equation is left out: it is the same for
all completions of a prompt, so that neither a difference of two of them nor a group-relative advantage depends on it.
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
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from ..errors import require, require_count, require_number, require_type
from ..roles.switching import using_adapter
from ..rollouts.prompts import TokenizedPrompt


IMPLICIT_REWARD = "implicit_reward"  # its default name in logs, and what stands for it among reward functions


def token_ids(tokenizer: Any, text: str | list[dict[str, Any]], **chat_template_kwargs: Any) -> list[int]:
    """
    The token ids that TRL makes of a prompt or of a prompt with its completion.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            A processor is used for text only.
        text (`str` or `list[dict]`):
            Plain text, or messages, to which the chat template is applied.
        **chat_template_kwargs:
            Arguments of the chat template, not used for plain text.

    Returns:
        `list[int]`
    """
    is_processor = isinstance(tokenizer, ProcessorMixin)
    if isinstance(text, str):
        ids = tokenizer(text=text)["input_ids"]
    else:
        messages = prepare_multimodal_messages(text) if is_processor else text
        rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **chat_template_kwargs)
        ids = rendered["input_ids"]
    return list(ids[0] if is_processor else ids)  # a processor returns a batch


@contextmanager
def in_evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode. Afterwards, the modes of modules are what they were before."""
    modules = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modules:
            module.training = training


def _copy(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(weight, "ds_id") or isinstance(weight, DTensor):
        raise ValueError(
            "snapshot=True copies weights, but these are sharded over processes (ZeRO-3, FSDP), and no process has "
            "all of them. Save the policy, load it as a separate model, and pass that one."
        )
    return weight.detach().clone()


class ImplicitReward:
    """
    β·log π(y|x)/π_ref(y|x) as a reward function for every trainer. It is called as TRL calls reward functions, with
    `prompts`, `completions` and `completion_ids`, and takes plain prompts, conversations and token ids. Text only.

    Scoring trains nothing: no gradients are kept, dropout is off, and afterwards the models are in the mode in which
    they were. Log-probabilities are taken at temperature 1, as in DPO, whatever the sampling temperature. All ids of a
    completion count, including those that a tool wrote.

    `snapshot` decides whether the reward changes while a trainer trains the same weights further. A snapshot copies
    every weight that is trainable or belongs to one of the two adapters, and the forward pass uses the copies
    (`torch.func.functional_call`; the model keeps its own weights and gets no additional adapter that checkpoints
    would have to hold). All other weights are shared. They were frozen when the copies were made, and each call checks
    that they still are. A separate `reference` is not copied and must not be trained.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            π. For a PEFT model, π has the adapter that is active now.
        reference ([`~transformers.PreTrainedModel`] or `None`):
            π_ref. `None` is for PEFT models: the reference is then the same model with `reference_adapter`, or with
            its adapter switched off.
        beta (`float`):
            β, in reward per nat.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenises prompts, conversations by its chat template, as DPO's data were.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions per forward pass. Those of similar length are batched together.
        by_token (`bool`, *optional*, defaults to `False`):
            Return a list for each completion, with one reward per token. They add up to the completion's reward.
        reference_adapter (`str`, *optional*):
            The adapter of the policy that makes it the reference.
        snapshot (`bool`, *optional*, defaults to `False`):
            Keep the weights as they are now. `False`: if the policy is trained further, the reward changes with it.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.
        name (`str`, *optional*, defaults to `"implicit_reward"`):
            The reward's name in logs.

    Raises:
        ValueError: if there is no reference, if several adapters are active, or if a snapshot is asked for of weights
            that are sharded over processes (ZeRO-3, FSDP) or of two adapters with different configurations.
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
        name: str = IMPLICIT_REWARD,
    ) -> None:
        require_count("batch_size", batch_size)
        require_number("beta", beta)
        require_type("policy", policy, nn.Module, "Pass a loaded model.")
        if reference is not None:
            require_type(
                "reference", reference, nn.Module, "Pass a loaded model, or None for a policy with an adapter."
            )
        remedy = "Pass the policy's tokenizer, such as AutoTokenizer.from_pretrained(...)."
        require_type("tokenizer", tokenizer, PreTrainedTokenizerBase | ProcessorMixin, remedy)
        require_type("chat_template_kwargs", chat_template_kwargs, dict | None, "Pass a dict, or None.")
        self.policy: Any = getattr(policy, "module", policy)
        self.reference: Any = getattr(reference, "module", reference)
        self.has_adapter = is_peft_model(self.policy)
        require(
            self.reference is not None or self.has_adapter,
            "`reference` is None, and the policy has no adapter to switch off. Pass the model from which DPO started.",
        )
        require(
            self.reference is not self.policy,
            "`policy` and `reference` are the same object, so that the reward would be 0 everywhere. Pass the model "
            "from which DPO started as `reference`.",
        )
        adapters = list(self.policy.active_adapters) if self.has_adapter else []
        require(
            len(adapters) <= 1,
            f"The policy has several active adapters, {adapters}. Activate the one that was trained.",
        )
        known = list(getattr(self.policy, "peft_config", {}))
        require(
            reference_adapter is None or reference_adapter in known,
            f"The policy has no adapter {reference_adapter!r}. It has {known}.",
        )
        self.adapter = adapters[0] if adapters else None
        self.reference_adapter = reference_adapter
        self.beta = beta
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.by_token = by_token
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.__name__ = name
        self._thread = threading.get_ident()
        self._copies: dict[str, torch.Tensor] | None = None
        self._reference_copies: dict[str, torch.Tensor] | None = None
        if snapshot:
            self._copy_weights()

    def _copy_weights(self) -> None:
        others = set(getattr(self.policy, "peft_config", {})) - {self.adapter}  # adapters that the policy doesn't use
        weights = {key: w for key, w in self.policy.named_parameters() if not others.intersection(key.split("."))}
        self._copies = {
            key: _copy(weight)
            for key, weight in weights.items()
            if weight.requires_grad or self.adapter in key.split(".")
        }
        self._shared = [key for key in weights if key not in self._copies]
        self._reference_copies = self._copies
        if self.reference_adapter is None:
            return
        # Under the keys of the policy's adapter, so that the reference's own adapter may be deleted or reused
        mine, other = (self.policy.peft_config[name] for name in (self.adapter, self.reference_adapter))
        require(
            {**mine.to_dict(), "inference_mode": None} == {**other.to_dict(), "inference_mode": None},
            f"snapshot=True needs adapters of one configuration, but {self.adapter!r} and {self.reference_adapter!r} "
            "are configured differently. Load the reference as a separate model.",
        )
        of_policy, of_reference = f".{self.adapter}.", f".{self.reference_adapter}."
        policy_keys = {key.replace(of_policy, of_reference): key for key in weights if of_policy in key}
        self._reference_copies = dict(self._copies)
        for key, weight in self.policy.named_parameters():
            if key in policy_keys:
                self._reference_copies[policy_keys[key]] = _copy(weight)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float] | list[list[float]]:
        """
        Score completions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                One for each completion.
            completions (`list`):
                Ignored: `completion_ids` are scored.
            completion_ids (`list[list[int]]`):
                Token ids of each completion.

        Returns:
            `list[float]`, or with `by_token` `list[list[float]]`, one for each completion.

        Raises:
            ValueError: if a prompt has no tokens, because the first token of its completion has no probability then.
            RuntimeError: if weights that the snapshot shares have become trainable, or if the call comes from a thread
                other than the one that made this object, where it would have to change adapters.
        """
        self._check()
        rows = [(self._ids(prompt), list(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        require(
            all(prompt for prompt, _ in rows),
            "a prompt has no tokens. Give it at least one, such as the tokenizer's bos token.",
        )
        rewards: list[list[float]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
        models = [model for model in (self.policy, self.reference) if model is not None]
        with torch.no_grad(), in_evaluation_mode(*models):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for row, log_ratios in zip(batch, self._log_ratios([rows[row] for row in batch]), strict=True):
                    rewards[row] = (self.beta * log_ratios.double()).tolist()
        return rewards if self.by_token else [sum(reward) for reward in rewards]

    def _check(self) -> None:
        if (self.has_adapter or self._copies is not None) and threading.get_ident() != self._thread:
            raise RuntimeError(
                f"{self.__name__} shares its model with the thread that made it, and scoring from another thread "
                "would switch adapters while the model is in use. Leave rewards_in_flight off, or build the reward "
                "from a policy and a reference that nothing else uses."
            )
        if self._copies is not None:
            weights = dict(self.policy.named_parameters())
            gone = [key for key in (*self._copies, *self._shared) if key not in weights]
            trained = [key for key in self._shared if key in weights and weights[key].requires_grad]
            if gone or trained:
                raise RuntimeError(
                    f"{self.__name__} shares weights with a policy "
                    + (f"that has lost {gone[0]!r}" if gone else f"whose {trained[0]!r} is trained now")
                    + ", so that it would return different rewards than before. Build it from a separate model."
                )

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, TokenizedPrompt):
            return prompt.input_ids
        if isinstance(prompt, str):
            return token_ids(self.tokenizer, prompt)
        return token_ids(self.tokenizer, prompt, add_generation_prompt=True, **self.chat_template_kwargs)

    def _log_ratios(self, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """log π/π_ref of each token, a tensor for each completion, from rows of prompt and completion ids."""
        if self.has_adapter:
            with using_adapter(self.policy, self.adapter):
                policy = self._logps(self.policy, self._copies, rows)
        else:
            policy = self._logps(self.policy, self._copies, rows)
        if self.reference is not None:
            reference = self._logps(self.reference, None, rows)
        else:
            # The copies of a reference adapter are used through the policy's adapter
            through_policy = self._copies is not None and self.reference_adapter is not None
            with using_adapter(self.policy, self.adapter if through_policy else self.reference_adapter):
                reference = self._logps(self.policy, self._reference_copies, rows)
        return [mine - other for mine, other in zip(policy, reference, strict=True)]

    def _logps(
        self, model: Any, weights: dict[str, torch.Tensor] | None, rows: list[tuple[list[int], list[int]]]
    ) -> list[torch.Tensor]:
        """Log-probabilities of the completions' tokens, in float32 on the CPU; `weights` replace the model's own."""
        device = next(model.parameters()).device
        longest = max(len(prompt) + len(ids) for prompt, ids in rows)
        padding = [longest - len(prompt) - len(ids) for prompt, ids in rows]
        # Padded on the right, where it moves no position, with any id, because padding is masked
        filled = [[*prompt, *ids, *[0] * pads] for (prompt, ids), pads in zip(rows, padding, strict=True)]
        masks = [[1] * (longest - pads) + [0] * pads for pads in padding]
        first = min(len(prompt) for prompt, _ in rows) - 1  # logits before this position belong to prompts
        inputs = {
            "input_ids": torch.tensor(filled, device=device),  # (B, T)
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
