"""Recipes with one trainer, from their arguments to a published model."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from trl import SFTConfig

from ..monitors.bands import Bands, of_stage
from ..monitors.health import HealthChecks
from ..monitors.progress import ProgressLines
from ..monitors.verify import verify
from ..trainers.seams.pushes import save_without_push
from .arguments import DataArguments, ParsedArguments, PolicyArguments, as_mapping, parse_arguments
from .dry_run import before_loading
from .fitting import Stage
from .loading import RewardFunc, check_models, load_curriculum, load_data, load_reward_funcs, trainer_arguments
from .measuring import add_held_out, token_credits
from .program import preparing, program
from .publishing import add_results, publish, write_arguments, write_results
from .supervised import SFTTrainer


def watch(trainer: Any, script_args: DataArguments | None = None, stage: str | None = None) -> None:
    """
    Prints progress on single lines, and adds the health checks and the expected numbers that the arguments ask for, of
    several stages those of `stage`.
    """
    ProgressLines.instead_of_bars(trainer)
    expect = {} if script_args is None else as_mapping(script_args.expect, "expect")
    if expect:
        trainer.add_callback(Bands(expect if stage is None else of_stage(expect, stage)))
    if getattr(script_args, "health_checks", False):
        HealthChecks().add_to(trainer)


def train_and_save(trainer: Any, arguments: ParsedArguments | None = None) -> None:
    """
    Trains and saves at once, before anything later can fail. Training resumes from `--resume_from_checkpoint` if that
    is given: a folder, or `true` for the last checkpoint in the output folder. The arguments, and with the model the
    log, are written beside it.
    """
    watch(trainer, None if arguments is None else arguments.script)
    if arguments is not None and trainer.is_world_process_zero():
        write_arguments(trainer.args.output_dir, arguments)
    checkpoint = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint))
    save_without_push(trainer)
    trainer.save_state()


@program
def train_supervised(argv: list[str] | None = None) -> SFTTrainer:
    """
    The whole of `recipes/sft.py`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        [`~trl.SFTTrainer`]: after training.
    """
    with preparing():
        arguments = parse_arguments(DataArguments, SFTConfig, argv)
        data = load_data(arguments.script, arguments.mixture)
        check_models(arguments.script, arguments.model)
        settings = trainer_arguments(arguments.script, arguments.training, arguments.model, data)
        before_loading([Stage(SFTTrainer, settings)], arguments, data)
        trainer = SFTTrainer(**settings)
    train_and_save(trainer, arguments)
    publish(trainer, arguments.script.dataset_name)
    return trainer


@program
def train_policy(
    trainer_class: type,
    config_class: type,
    argv: list[str] | None = None,
    *,
    script_class: type = PolicyArguments,
    defaults: Mapping[str, Any] | None = None,
    further_arguments: Callable[[Any, list[RewardFunc]], dict[str, Any]] | None = None,
) -> Any:
    """
    The whole of a reinforcement learning recipe: read the arguments, train, measure on held-out prompts before and
    after, write `summary.json`, `learning.png` and the model card, save and push.

    Args:
        trainer_class (`type`):
            One of `trl_ext`'s trainers.
        config_class (`type`):
            Its configuration class.
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.
        script_class (`type`, *optional*):
            [`PolicyArguments`] or a subclass.
        defaults (`Mapping[str, Any]`, *optional*):
            Defaults of the recipe, where they are not those of the classes.
        further_arguments (`Callable`, *optional*):
            Takes script arguments and reward functions, and returns further arguments of the trainer, which win.

    Returns:
        The trainer, after training.
    """
    started = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    with preparing():
        arguments = parse_arguments(script_class, config_class, argv, defaults)
        script_args = arguments.script
        data = load_data(script_args, arguments.mixture)
        has_adapter = arguments.model.use_peft
        reward_funcs = load_reward_funcs(script_args, arguments.training, has_adapter=has_adapter)
        check_models(script_args, arguments.model)
        further = {} if further_arguments is None else further_arguments(script_args, reward_funcs)
        settings = {
            **trainer_arguments(script_args, arguments.training, arguments.model, data),
            **{"reward_funcs": reward_funcs, **further},
            "curriculum": load_curriculum(script_args.curriculum, script_args.curriculum_column),
        }
        before_loading([Stage(trainer_class, settings, script_args.on_gpus)], arguments, data)
        trainer = trainer_class(**settings)
        held_out = add_held_out(trainer, data, script_args)
    if script_args.verify:
        verify(trainer)
    train_and_save(trainer, arguments)
    credits, summary = token_credits(trainer, data, script_args), None
    if trainer.is_world_process_zero():
        measured, seconds = {} if held_out is None else held_out.measured, time.monotonic() - started
        summary = write_results(trainer, arguments, measured, seconds, argv, script_args.reward_model_name_or_path)
        add_results(trainer, arguments, summary, credits)
    publish(trainer, script_args.dataset_name, summary)
    return trainer
