"""Recipes that sample completions and train nothing: preference pairs, and prompts without the solved ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ..curriculum.difficulty import drop_solved, pass_rates
from ..errors import UserError
from ..preferences.flags import flag_pairs
from ..preferences.pairs import make_pairs
from ..trainers.grpo import GRPOTrainer
from ..trainers.grpo_config import GRPOConfig
from .arguments import FilterArguments, PairArguments, ParsedArguments, parse_arguments
from .dry_run import before_loading
from .fitting import Stage
from .loading import check_models, load_data, load_reward_funcs, trainer_arguments
from .measuring import prompts_at_once
from .program import preparing, program
from .publishing import leave


@program
def sample_pairs(argv: list[str] | None = None) -> Dataset:
    """
    The whole of `recipes/make_pairs.py`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        [`~datasets.Dataset`]: the pairs, which are also in the output folder.
    """
    with preparing():
        arguments = parse_arguments(PairArguments, GRPOConfig, argv)
        script_args, training_args = arguments.script, arguments.training
        split, output = script_args.dataset_train_split, Path(training_args.output_dir)
        data = load_data(script_args, arguments.mixture)
        prompts = data[split]
        if script_args.max_prompts is not None:
            prompts = prompts.shuffle(seed=training_args.seed).take(script_args.max_prompts)
        trainer = _sampler(arguments, data)
    pairs, report = make_pairs(
        trainer,
        prompts,
        **{name: getattr(script_args, name) for name in ("strategy", "margin", "max_pairs", "truncated")},
        batch_size=prompts_at_once(training_args, trainer.num_generations),
        seed=training_args.seed,
        partial_results=output / "completions.jsonl",
        on_progress=_progress(trainer, "sampled for"),
    )
    _, flags = flag_pairs(pairs)
    if trainer.is_world_process_zero():
        DatasetDict({split: pairs}).save_to_disk(str(output))
        report.save(output / "report.json")
    trainer.accelerator.print(f"{report}\n{flags}\nSaved to {output}.")
    leave(trainer)
    return pairs


@program
def filter_prompts(argv: list[str] | None = None) -> Dataset:
    """
    The whole of `recipes/filter_prompts.py`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        [`~datasets.Dataset`]: the prompts that are kept, which are also in the output folder.
    """
    with preparing():
        arguments = parse_arguments(FilterArguments, GRPOConfig, argv)
        script_args, training_args = arguments.script, arguments.training
        split, output = script_args.dataset_train_split, Path(training_args.output_dir)
        data = load_data(script_args, arguments.mixture)
        trainer = _sampler(arguments, data)
    rated = pass_rates(
        trainer,
        data[split],
        batch_size=prompts_at_once(training_args, training_args.num_generations),
        seed=training_args.seed,
        partial_results=output / "pass_rates.jsonl",
        on_progress=_progress(trainer, "rolled out"),
    )
    kept = drop_solved(rated, script_args.drop_unsolved)
    if trainer.is_world_process_zero():
        DatasetDict({**data, split: kept}).save_to_disk(str(output))
    trainer.accelerator.print(f"Kept {len(kept)} of {len(rated)} prompts, in {output}.")
    leave(trainer)
    return kept


def _sampler(arguments: ParsedArguments, data: Any) -> GRPOTrainer:
    if arguments.script.expect:
        raise UserError("--expect compares the logs of a training, and this recipe trains nothing. Leave it out.")
    rewards: Any = load_reward_funcs(arguments.script, arguments.training)
    check_models(arguments.script, arguments.model)
    settings = trainer_arguments(arguments.script, arguments.training, arguments.model, data)
    settings["reward_funcs"] = rewards
    before_loading([Stage(GRPOTrainer, settings, trains=False)], arguments, data)
    return GRPOTrainer(**settings)


def _progress(trainer: GRPOTrainer, done: str) -> Callable[[int, int], None]:
    return lambda count, rows: trainer.accelerator.print(f"{done} {count} of {rows} prompts", flush=True)
