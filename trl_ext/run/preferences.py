"""Recipes that learn from pairs of a better and a worse completion: a reward model, and DPO."""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from trl import RewardConfig

from ..evaluation.held_out_texts import HELD_OUT_TEXTS, PromptTexts, write_texts
from ..reports.card import results_section
from ..trainers.dpo import DPOConfig, DPOTrainer
from .arguments import DataArguments, DPOArguments, parse_arguments
from .dry_run import before_loading
from .fitting import Stage
from .loading import check_models, load_curriculum, load_data, trainer_arguments
from .measuring import pair_accuracy, score_completions
from .program import preparing, program
from .publishing import publish, write_results
from .supervised import RewardTrainer
from .training import train_and_save


PAIRS = ("chosen", "rejected")  # columns that every form of pairs has


def as_policies_are_scored(data: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """
    Plain text as token ids. TRL's reward trainer would end it with the end-of-sequence token, which GRPO and PPO leave
    out of the text that they have scored: the score would be read at a token that never was trained. Conversations
    are the same on both sides, and stay as they are.

    Args:
        data (`Mapping[str, Any]`):
            Data sets by split. Those without a column `chosen` stay as they are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The reward model's tokenizer.

    Returns:
        `dict[str, Any]`: the same splits, plain text with `chosen_ids` and `rejected_ids`.
    """

    def with_ids(row: dict[str, Any]) -> dict[str, Any]:
        if "chosen_ids" in row or not isinstance(row.get("chosen"), str):
            return {}
        texts = {name: row.get("prompt", "") + row[name] for name in ("chosen", "rejected")}
        return {f"{name}_ids": tokenizer(text=text)["input_ids"] for name, text in texts.items()}

    return {
        # A stream whose rows were changed doesn't know its columns
        split: rows.map(with_ids) if "chosen" in (rows.column_names or "chosen") else rows
        for split, rows in data.items()
    }


@program
def train_reward_model(argv: list[str] | None = None) -> RewardTrainer:
    """
    The whole of `recipes/reward.py`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        [`~trl.RewardTrainer`]: after training.
    """
    started = time.monotonic()
    with preparing():
        arguments = parse_arguments(DataArguments, RewardConfig, argv)
        # The head is trained, and saved, with the adapter
        model_args = replace(arguments.model, lora_task_type="SEQ_CLS")
        data = load_data(arguments.script, arguments.mixture, PAIRS)
        check_models(arguments.script, model_args)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
        data = as_policies_are_scored(data, tokenizer)
        settings = trainer_arguments(arguments.script, arguments.training, model_args, data)
        before_loading([Stage(RewardTrainer, settings)], arguments, data)
        trainer = RewardTrainer(**settings)
    train_and_save(trainer, arguments)
    summary = None
    if trainer.is_world_process_zero() and (measured := pair_accuracy(trainer)):
        summary = write_results(trainer, arguments, measured, time.monotonic() - started)
        trainer.card.sections.append(partial(results_section, summary))
    publish(trainer, arguments.script.dataset_name, summary)
    return trainer


@program
def train_dpo(argv: list[str] | None = None) -> DPOTrainer:
    """
    The whole of `recipes/dpo.py`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        [`DPOTrainer`]: after training.
    """
    started = time.monotonic()
    with preparing():
        arguments = parse_arguments(DPOArguments, DPOConfig, argv)
        script_args = arguments.script
        data = load_data(script_args, arguments.mixture, PAIRS)
        check_models(script_args, arguments.model)
        curriculum = load_curriculum(script_args.curriculum, script_args.curriculum_column)
        settings = trainer_arguments(script_args, arguments.training, arguments.model, data)
        settings["curriculum"] = curriculum
        before_loading([Stage(DPOTrainer, settings, script_args.on_gpus)], arguments, data)
        trainer = DPOTrainer(**settings)
    texts: list[list[PromptTexts]] = [[], []]
    before = score_completions(trainer, script_args, data, texts[0])
    train_and_save(trainer, arguments)
    after, summary = score_completions(trainer, script_args, data, texts[1]), None
    if trainer.is_world_process_zero():
        measured = pair_accuracy(trainer)
        for step, found, written in zip((0, trainer.state.global_step), (before, after), texts, strict=True):
            measured[step] = {**measured.get(step, {}), **found}
            if written:
                write_texts(Path(trainer.args.output_dir) / HELD_OUT_TEXTS, step, written)
        summary = write_results(trainer, arguments, dict(sorted(measured.items())), time.monotonic() - started)
        trainer.card.sections.append(partial(results_section, summary))
    publish(trainer, script_args.dataset_name, summary)
    return trainer
