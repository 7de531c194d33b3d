"""
Trains scorers on preference pairs. [`~trl_ext.preferences.cleaning.clean_by_cross_fitting`] trains one on each set of
folds.

A reward model scores a completion at its last token, with a head that starts without knowledge of what is good. DPO's
implicit reward starts from what the policy already finds likely, and ranks more pairs correctly if there are few.
"""

import copy
import tempfile
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from ..errors import require
from ..rewards.implicit import ImplicitReward
from ..rewards.models import RewardModelOnIds
from ..rollouts.prompts import TokenizedPrompt
from .pairs import CHAT_TEMPLATE_KWARGS, tokenized_for_dpo


DPO_COLUMNS = ("prompt", "chosen", "rejected", CHAT_TEMPLATE_KWARGS)
# A fold's scorer is neither saved, nor evaluated, nor reported
QUIET = {
    **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "eval_strategy": "no"},
    **{"eval_on_start": False, "push_to_hub": False, "load_best_model_at_end": False, "resume_from_checkpoint": None},
}


@dataclass
class ScorerTraining:
    """
    How a scorer is trained. The subclasses are called with pairs, and return the scorer.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Id or folder of the model from which every scorer starts. A loaded model is changed by the training, so
            that it can be used for one scorer only.
        args (`dict`, *optional*):
            Arguments of the trainer's configuration. Scorers are neither saved nor evaluated, whatever they say.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration of an adapter that is trained instead of the whole model. It stays as it is.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, by default the model's.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions per forward pass when the scorer scores.
    """

    model: Any
    args: dict[str, Any] = field(default_factory=dict)
    peft_config: Any = None
    processing_class: Any = None
    batch_size: int = 64
    _used: bool = field(default=False, init=False, repr=False)

    def start(self) -> Any:
        """The model for the next scorer. Raises `ValueError` if an earlier scorer has changed it."""
        require(
            isinstance(self.model, str) or not self._used,
            "The model is loaded, and a scorer was trained on it: the next scorer would start from what that one "
            "learned about the pairs that it is to judge. Pass an id or a folder.",
        )
        self._used = True
        return self.model

    def trained(self, trainer_class: type, config_class: type, dataset: Dataset, tokenizer: Any) -> Any:
        """A trainer of TRL's after its training."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_class(
                model=self.start(),
                args=config_class(**{**self.args, **QUIET, "output_dir": folder}),
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=copy.deepcopy(self.peft_config),  # PEFT writes into it
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer


class RewardModelTraining(ScorerTraining):
    """
    Trains a reward model with TRL's [`~trl.RewardTrainer`]. The scorer is that model. Completions are tokenised in the
    same way for training and scoring: plain text ends with the end-of-sequence token, conversations end as the chat
    template says. A causal model gets a new head; if an adapter is trained, name the head in its `modules_to_save`.
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
        trainer = self.trained(RewardTrainer, RewardConfig, Dataset.from_dict(ids), tokenizer)
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        return RewardModelScorer(model, tokenizer, self.batch_size, template)


@dataclass
class RewardModelScorer:
    """A scorer: the reward model that [`RewardModelTraining`] trained."""

    model: Any
    tokenizer: Any
    batch_size: int
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        # It scores the whole sequence, wherever the prompt ends
        score = RewardModelOnIds(self.model, "out_of_fold", self.tokenizer.pad_token_id, self.batch_size)
        ids = _split_all(self.tokenizer, prompts, completions, self.chat_template_kwargs)
        return score([TokenizedPrompt("", prompt) for prompt, _ in ids], [completion for _, completion in ids])


class ImplicitRewardTraining(ScorerTraining):
    """
    Trains a policy with TRL's [`~trl.DPOTrainer`]. The scorer is its implicit reward β·log π/π_ref
    (https://huggingface.co/papers/2305.18290, eq. 5), with the model from which training started as the reference.
    """

    def __call__(self, pairs: Dataset) -> "ImplicitRewardScorer":
        tokenizer = self.processing_class or AutoTokenizer.from_pretrained(self.model)
        rows = pairs.select_columns([name for name in DPO_COLUMNS if name in pairs.column_names])
        trainer = self.trained(DPOTrainer, DPOConfig, rows, tokenizer)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        reference = trainer.ref_model
        if reference is None and self.peft_config is None:  # with `precompute_ref_log_probs`, TRL keeps no reference
            reference = AutoModelForCausalLM.from_pretrained(self.model, **(self.args.get("model_init_kwargs") or {}))
            reference = reference.to(policy.device)
        reward = ImplicitReward(policy, reference, trainer.beta, tokenizer, batch_size=self.batch_size)
        return ImplicitRewardScorer(reward, tokenizer, _template(pairs))


@dataclass
class ImplicitRewardScorer:
    """A scorer: the implicit reward of the policy that [`ImplicitRewardTraining`] trained."""

    reward: ImplicitReward
    tokenizer: Any
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        ids = _split_all(self.tokenizer, prompts, completions, self.chat_template_kwargs)
        tokenized_prompts = [TokenizedPrompt("", prompt) for prompt, _ in ids]
        scores: Any = self.reward(tokenized_prompts, completions, [completion for _, completion in ids])
        return list(scores)


def _split_all(
    tokenizer: Any, prompts: Any, completions: Any, chat_template_kwargs: dict[str, Any]
) -> list[tuple[list[int], list[int]]]:
    rows = zip(prompts, completions, strict=True)
    return [tokenized_for_dpo(tokenizer, *row, chat_template_kwargs) for row in rows]


def _template(pairs: Dataset) -> dict[str, Any]:
    """The arguments of the chat template. TRL reads them in every row, but a scorer has one set for all rows."""
    if CHAT_TEMPLATE_KWARGS not in pairs.column_names:
        return {}
    found = list(pairs[CHAT_TEMPLATE_KWARGS])
    require(
        all(row == found[0] for row in found),
        f"The rows have different `{CHAT_TEMPLATE_KWARGS}`. Clean the rows of each kind separately.",
    )
    return dict(found[0] or {})
