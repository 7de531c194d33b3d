"""
Scorers that are trained on preference pairs: what [`~trl_ext.preferences.cleaning.clean_by_cross_fitting`] fits to
each set of folds.

A reward model reads a completion at its last token and has to learn from nothing what is good. DPO's implicit reward
starts from what the policy already finds likely, and is right about more pairs where they are few.
"""

import tempfile
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from ..rewards.implicit import ImplicitReward
from ..rewards.models import RewardModelOnIds
from ..rollouts.prompts import TokenizedPrompt
from .pairs import CHAT_TEMPLATE_KWARGS, tokenized_for_dpo


READ = ("prompt", "chosen", "rejected", CHAT_TEMPLATE_KWARGS)
# A fold's scorer is used and forgotten
QUIET = {
    **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "eval_strategy": "no"},
    **{"eval_on_start": False, "push_to_hub": False, "load_best_model_at_end": False, "resume_from_checkpoint": None},
}


@dataclass
class ScorerFit:
    """
    How a scorer is trained.

    Args:
        model (`str`):
            Id or folder of the model that every scorer starts from. A loaded one is changed, so that it serves once.
        args (`dict`, *optional*):
            Arguments of the trainer's configuration. Nothing is saved or reported.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Of an adapter to train in place of the model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, by default the model's.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions that are scored at once.
    """

    model: Any
    args: dict[str, Any] = field(default_factory=dict)
    peft_config: Any = None
    processing_class: Any = None
    batch_size: int = 64
    _used: bool = field(default=False, init=False, repr=False)

    def start(self) -> Any:
        """What the next scorer starts from. Raises `ValueError` if an earlier one has changed it."""
        if self._used and not isinstance(self.model, str):
            raise ValueError(
                "The model is loaded, and a scorer was trained on it: the next one would start from what that learned "
                "of the pairs it is to judge. Pass an id or a folder."
            )
        self._used = True
        return self.model


class RewardModelFit(ScorerFit):
    """
    Trains a reward model with TRL's [`~trl.RewardTrainer`], and scores with it. Completions are tokenised alike in
    both: plain text ends with the end-of-sequence token, conversations as the chat template says. A causal model gets
    a new head; where an adapter is trained, name it in `modules_to_save`.
    """

    def __call__(self, pairs: Dataset) -> "RewardModelScorer":
        tokenizer = self.processing_class or AutoTokenizer.from_pretrained(self.model)
        sides, template = ("chosen", "rejected"), _template(pairs)
        ids = {
            f"{side}_ids": [
                [*prompt, *completion]
                for prompt, completion in _split_all(tokenizer, pairs["prompt"], pairs[side], template)
            ]
            for side in sides
        }
        with tempfile.TemporaryDirectory() as folder:
            trainer = RewardTrainer(
                model=self.start(),
                args=RewardConfig(**{**self.args, **QUIET, "output_dir": folder}),
                train_dataset=Dataset.from_dict(ids),
                processing_class=tokenizer,
                peft_config=self.peft_config,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        return RewardModelScorer(model, tokenizer, self.batch_size, template)


@dataclass
class RewardModelScorer:
    """The scores of a reward model that [`RewardModelFit`] trained."""

    model: Any
    tokenizer: Any
    batch_size: int
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        # The reward model of the engine reads ids; it doesn't ask where the prompt ends
        score = RewardModelOnIds(self.model, "out_of_fold", self.tokenizer.pad_token_id, self.batch_size)
        ids = _split_all(self.tokenizer, prompts, completions, self.chat_template_kwargs)
        return score([TokenizedPrompt("", prompt) for prompt, _ in ids], [completion for _, completion in ids])


class ImplicitRewardFit(ScorerFit):
    """
    Trains a policy with TRL's [`~trl.DPOTrainer`], and scores with its implicit reward β·log π/π_ref
    (https://huggingface.co/papers/2305.18290, eq. 5). What it starts from is the reference.
    """

    def __call__(self, pairs: Dataset) -> "ImplicitRewardScorer":
        tokenizer = self.processing_class or AutoTokenizer.from_pretrained(self.model)
        with tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                model=self.start(),
                args=DPOConfig(**{**self.args, **QUIET, "output_dir": folder}),
                train_dataset=pairs.select_columns([name for name in READ if name in pairs.column_names]),
                processing_class=tokenizer,
                peft_config=self.peft_config,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        policy = trainer.accelerator.unwrap_model(trainer.model)
        reference = trainer.ref_model
        if reference is None and self.peft_config is None:  # its log-probabilities were computed beforehand
            reference = AutoModelForCausalLM.from_pretrained(self.model, **(self.args.get("model_init_kwargs") or {}))
            reference = reference.to(policy.device)
        reward = ImplicitReward(policy, reference, trainer.beta, tokenizer, batch_size=self.batch_size)
        return ImplicitRewardScorer(reward, tokenizer, _template(pairs))


@dataclass
class ImplicitRewardScorer:
    """The implicit reward of a policy that [`ImplicitRewardFit`] trained."""

    reward: ImplicitReward
    tokenizer: Any
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        ids = _split_all(self.tokenizer, prompts, completions, self.chat_template_kwargs)
        asked = [TokenizedPrompt("", prompt) for prompt, _ in ids]
        scores: Any = self.reward(asked, completions, [completion for _, completion in ids])
        return list(scores)


def _split_all(
    tokenizer: Any, prompts: Any, completions: Any, chat_template_kwargs: dict[str, Any]
) -> list[tuple[list[int], list[int]]]:
    rows = zip(prompts, completions, strict=True)
    return [tokenized_for_dpo(tokenizer, *row, chat_template_kwargs) for row in rows]


def _template(pairs: Dataset) -> dict[str, Any]:
    """The arguments of the chat template, which TRL reads in every row; a scorer has one for all."""
    if CHAT_TEMPLATE_KWARGS not in pairs.column_names:
        return {}
    found = list(pairs[CHAT_TEMPLATE_KWARGS])
    if any(row != found[0] for row in found):
        raise ValueError(f"Rows differ in `{CHAT_TEMPLATE_KWARGS}`. Clean those that are alike by themselves.")
    return dict(found[0] or {})
