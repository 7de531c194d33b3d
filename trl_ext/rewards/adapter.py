"""
A reward model that is an adapter on the policy's own base: policy, reference and reward share one set of base weights.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from ..errors import require, require_count, require_type
from ..roles.critic import base_model_of
from ..roles.reward_adapter import ON_ITS_OWN, REWARD_ADAPTER, RewardAdapter
from ..roles.switching import using_adapter
from ..rollouts.last_states import batches_of, last_states
from ..rollouts.prefix_trees import Cost
from ..rollouts.prompts import TokenizedPrompt
from ..rollouts.shared_pass import Sharing
from .implicit import in_evaluation_mode


class AdapterReward:
    """
    The score of a reward model that `recipes/reward.py --use_peft true` (TRL's `RewardTrainer` with PEFT) trained on
    the policy's base, as a reward function for every trainer of `trl_ext`. The trainer loads the adapter into its
    policy, which must be trained with an adapter, too: the base is there once, and stays as it is.

    ```python
    trainer = GRPOTrainer(base, AdapterReward("reward_adapter"), peft_config=LoraConfig(...), ...)
    ```

    Scores are those of the reward model loaded on its own (`AutoPeftModelForSequenceClassification`), to rounding:
    text of prompt and completion, tokenised as TRL does it for reward models, read at the last token that isn't
    padding. Prompts given as token ids are scored as ids. Scoring trains nothing: no gradients are kept, dropout is
    off, and afterwards adapters and modes are what they were. The reward doesn't change while the policy is trained.

    Completions of one prompt compute it once, where that is exact (`share_prefixes` of the trainer). The trainer logs,
    a generation batch and process, `compute/NAME_passes`, and the tokens with padding as computed and as without
    sharing: `compute/NAME_tokens`, `compute/NAME_tokens_unshared`.

    Args:
        folder (`str` or `Path`):
            Folder in which PEFT saved the reward model, or its id on the Hub.
        name (`str`, *optional*):
            The reward's name in logs. Default: the last part of `folder`.
        adapter (`str`, *optional*, defaults to `"reward"`):
            Name of the adapter in the policy. Each `AdapterReward` of a trainer needs its own.
        batch_size (`int`, *optional*):
            Completions per forward pass. Default: the trainer's `per_device_train_batch_size`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenises text. Default: the one in `folder`, or else the policy's.
        check_base_name (`bool`, *optional*, defaults to `True`):
            Refuse a policy whose base goes by another name than the one that the adapter was trained on.

    Raises:
        ValueError: if the folder holds no reward adapter that can share a base.
    """

    def __init__(
        self,
        folder: Any,
        *,
        name: str | None = None,
        adapter: str = REWARD_ADAPTER,
        batch_size: int | None = None,
        tokenizer: Any = None,
        check_base_name: bool = True,
    ) -> None:
        if batch_size is not None:
            require_count("batch_size", batch_size)
        remedy = "Pass the reward model's tokenizer, such as AutoTokenizer.from_pretrained(...), or leave it out."
        require_type("tokenizer", tokenizer, PreTrainedTokenizerBase | None, remedy)
        require_type("adapter", adapter, str, "Pass a name for the adapter.")
        require(
            bool(adapter) and "." not in adapter and "lora" not in adapter,
            f"adapter={adapter!r} can't be the name of an adapter in PEFT. Choose another, without dots and 'lora'.",
        )
        self.files = RewardAdapter(folder)
        self.folder, self.adapter, self.batch_size = self.files.folder, adapter, batch_size
        self.check_base_name = check_base_name
        self.tokenizer = tokenizer if tokenizer is not None else _tokenizer_in(self.folder)
        self.__name__ = name or self.folder.rstrip("/").split("/")[-1]
        self._policy: Any = None
        self._model: Callable[[], Any] = lambda: None
        self._thread = 0

    def attached(
        self,
        policy: Any,
        *,
        model: Callable[[], Any] | None = None,
        tokenizer: Any = None,
        batch_size: int = 8,
        sharing: Sharing | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> "AdapterReward":
        """
        This reward for one policy, into which its adapter is loaded. Trainers of `trl_ext` call it.

        Args:
            policy ([`~peft.PeftModel`]):
                The policy, not wrapped for several processes.
            model (`Callable`, *optional*):
                Returns what is called for a pass: the policy as it is wrapped by then.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The policy's.
            batch_size (`int`, *optional*, defaults to `8`):
                Used if the reward has none of its own.
            sharing ([`~trl_ext.rollouts.shared_pass.Sharing`], *optional*):
                What passes may share, and their counters. Default: nothing.
            chat_template_kwargs (`dict`, *optional*):
                Further arguments of the chat template.

        Returns:
            [`AdapterReward`]: a copy. This one stays as it is.

        Raises:
            ValueError: if the adapter doesn't belong on the policy's base.
        """
        base = base_model_of(policy)
        self.files.check_base(base.config, base.config.name_or_path, self.check_base_name)
        self.files.add_to(policy, self.adapter)
        bound = copy.copy(self)
        bound._policy, bound._model = policy, model or (lambda: policy)
        bound._thread = threading.get_ident()
        bound._head = copy.deepcopy(self.files.head)
        bound._template = chat_template_kwargs or {}
        bound.batch_size = self.batch_size or batch_size
        bound.tokenizer = self.tokenizer if self.tokenizer is not None else getattr(tokenizer, "tokenizer", tokenizer)
        require(
            bound.tokenizer is not None,
            f"There is no tokenizer in {self.folder}. Pass AdapterReward(..., tokenizer=...).",
        )
        bound._reads_ids = tokenizer is None or _same_vocabulary(bound.tokenizer, tokenizer)
        bound._sharing = Sharing(Cost(0.0), pack=False) if sharing is None else sharing
        return bound

    @property
    def head(self) -> nn.Linear:
        """The score head that is used: that of the files until a trainer has attached the reward."""
        return self.files.head if self._policy is None else self._head

    _head: nn.Linear
    _template: dict[str, Any]
    _reads_ids: bool
    _sharing: Sharing

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """
        Score completions.

        Args:
            prompts, completions (`list`):
                Text or messages, one for each completion.
            completion_ids (`list[list[int]]`):
                Token ids of each completion, read for prompts that were given as token ids.
            log_metric (`Callable`, *optional*):
                TRL's, which takes the counters.

        Returns:
            `list[float]`

        Raises:
            ValueError: if there is nothing to read, or a token that the policy doesn't know.
            RuntimeError: if no trainer has attached the reward, or the call comes from another thread than the one
                that did.
        """
        self._check()
        rows = [torch.tensor(ids, dtype=torch.long) for ids in self._ids(prompts, completions, completion_ids)]
        sizes = list(map(len, rows))
        require(all(sizes), "A prompt with its completion has no tokens. Give each prompt at least one.")
        self._check_tokens(rows)
        by_ids = [isinstance(prompt, TokenizedPrompt) for prompt in prompts]
        last = [len(row) - 1 if ids else self._last(row) for row, ids in zip(rows, by_ids, strict=True)]
        sharing = self._sharing
        before = sharing.passes, sharing.token_slots, sharing.token_slots_unshared
        model, base = self._model(), base_model_of(self._policy)
        self._head.to(base.device)
        assert self.batch_size is not None
        scores = [0.0] * len(rows)
        with torch.no_grad(), in_evaluation_mode(model), using_adapter(self._policy, self.adapter):
            for batch in batches_of(sizes, list(map(repr, prompts)), self.batch_size):
                states = last_states(model, base, [rows[i] for i in batch], [last[i] for i in batch], sharing)
                for i, score in zip(batch, self._head(states.float()).squeeze(-1).tolist(), strict=True):
                    scores[i] = score
        if log_metric is not None:
            after = sharing.passes, sharing.token_slots, sharing.token_slots_unshared
            for what, now, earlier in zip(("passes", "tokens", "tokens_unshared"), after, before, strict=True):
                log_metric(f"compute/{self.__name__}_{what}", float(now - earlier))
        return scores

    def _check(self) -> None:
        if self._policy is None:
            raise RuntimeError(
                f"The reward {self.__name__} has no policy to share the base of. Pass it to a trainer of trl_ext "
                f"(reward_funcs), call attached(policy), or {ON_ITS_OWN}."
            )
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"The reward {self.__name__} shares its model with the thread that made it, and scoring from another "
                "thread would switch adapters while the model is in use. Leave rewards_in_flight and reward_timeout "
                f"off, or {ON_ITS_OWN}."
            )

    def _ids(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]) -> list[list[int]]:
        """Token ids of each prompt with its completion, as TRL makes them for reward models."""
        if any(isinstance(prompt, TokenizedPrompt) for prompt in prompts):
            require(
                self._reads_ids,
                f"Prompts are token ids, and the reward adapter in {self.folder} has another tokenizer than the "
                "policy. Pass prompts as text, in a column `prompt`.",
            )
            return [[*prompt.input_ids, *ids] for prompt, ids in zip(prompts, completion_ids, strict=True)]
        if is_conversational({"prompt": prompts[0]}):
            rows = [{"messages": prompt + completion} for prompt, completion in zip(prompts, completions, strict=True)]
            texts = [apply_chat_template(row, self.tokenizer, **self._template)["text"] for row in rows]
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        found: list[list[int]] = self.tokenizer(text=texts, add_special_tokens=False)["input_ids"]
        return found

    def _last(self, row: torch.Tensor) -> int:
        """Where a sequence classifier reads a row of text: at the last token that isn't the one that pads."""
        pad = self.tokenizer.pad_token_id
        real = (row != (self.tokenizer.eos_token_id if pad is None else pad)).nonzero()
        return int(real[-1]) if len(real) else 0

    def _check_tokens(self, rows: Sequence[torch.Tensor]) -> None:
        size = base_model_of(self._policy).config.get_text_config().vocab_size
        largest = max(int(row.max()) for row in rows)
        require(
            largest < size,
            f"The tokenizer of the reward adapter in {self.folder} makes the token id {largest}, and the policy has "
            f"only {size} embeddings. Pass AdapterReward(..., tokenizer=...) with the policy's tokenizer.",
        )


def _tokenizer_in(folder: str) -> Any:
    """The tokenizer that was saved beside an adapter; `None` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return None


def _same_vocabulary(tokenizer: Any, other: Any) -> bool:
    other = getattr(other, "tokenizer", other)
    return tokenizer is other or tokenizer.get_vocab() == other.get_vocab()
