"""The recipe of several stages: DPO, then PPO or a different method, from arguments to a published adapter."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from accelerate import PartialState
from huggingface_hub import create_repo, upload_folder
from trl import get_peft_config

import trl_ext

from ..errors import UserError
from ..monitors.bands import Band, Bands, entries, lines, of_stage
from ..monitors.verify import verify
from ..pipelines.dpo_then_ppo import DPOThenPPO
from ..reports.card import stages_section, write_stages_card
from ..reports.card_sections import details
from ..reports.plots import plot_stages
from ..reports.run_files import TrainedStage, read_run
from ..reports.summary import SUMMARY, summarize_stages, write_summary
from ..rewards.implicit import IMPLICIT_REWARD
from ..trainers.cards import as_written, example_of
from ..trainers.dpo import DPOConfig, DPOTrainer
from ..trainers.grpo import GRPOTrainer
from ..trainers.seams.pushes import out_of_reach
from .arguments import METHODS, HybridArguments, ParsedArguments, PolicyArguments, as_mapping, parse_arguments, peek
from .dry_run import before_loading
from .fitting import Stage
from .hub import uploading
from .loading import (
    check_models,
    get_split,
    load_curriculum,
    load_data,
    load_reward_funcs,
    ppo_arguments,
    shared_model_settings,
)
from .measuring import held_out_rows
from .parsing import RecipeParser, nearest
from .program import preparing, program
from .publishing import command_line, config_text, leave, on_the_hub, write_arguments
from .training import watch


# Arguments of the second stage that the first one takes over
SHARED_BY_STAGES = (
    *("output_dir", "use_cpu", "bf16", "fp16", "gradient_checkpointing", "gradient_checkpointing_kwargs", "seed"),
    *("report_to", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm"),
)
# What an upload leaves out: the stages' own folders
NOT_PUSHED = ("round_*", "start*")
SCHEDULE_SETTINGS = (
    *(
        "reference",
        "rounds",
        "accuracy_threshold",
        "accuracy_logs",
        "dpo_held_out_every",
        "dpo_patience",
        "fit_critic",
    ),
    *("held_out_samples", "held_out_every", "held_out_seed"),
)


@program
def train_dpo_then_ppo(argv: list[str] | None = None) -> DPOThenPPO:
    """
    The whole of `recipes/dpo_then_ppo.py`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        [`DPOThenPPO`]: after its last stage.
    """
    argv = sys.argv[1:] if argv is None else argv
    with preparing():
        method = peek(argv, "method", METHODS)
        stages = ("dpo", method.lower())
        config, trainer = getattr(trl_ext, f"{method}Config"), getattr(trl_ext, f"{method}Trainer")
        arguments = parse_arguments(HybridArguments, config, argv)
        script_args, training_args, model_args, mixture_args = arguments
        for name in as_mapping(script_args.expect, "expect"):
            if not name.startswith(tuple(f"{stage}/" for stage in stages)):
                raise UserError(
                    f"--expect has {name}, of no stage. Write {' or '.join(f'{s}/{name}' for s in stages)}."
                )
        data = load_data(script_args, mixture_args)
        check_models(script_args, model_args)
        rewards = load_reward_funcs(script_args, training_args, learned=[IMPLICIT_REWARD])
        further = {"reward_funcs": rewards, **(ppo_arguments(script_args, rewards) if method == "PPO" else {})}
        further["curriculum"] = load_curriculum(script_args.curriculum, script_args.curriculum_column)
        prompts = get_split(data, script_args.dataset_train_split, "dataset_train_split")
        first = preference_stage(script_args, training_args, data)
        before_loading(_stages(arguments, data, prompts, first, Stage(trainer, further)), arguments, data)
        schedule = DPOThenPPO(
            model_args.model_name_or_path,
            further.pop("reward_funcs"),
            prompts,
            output_dir=training_args.output_dir,
            policy_args=training_args,
            policy_trainer=trainer,
            policy_kwargs=further,
            **first,
            peft_config=get_peft_config(model_args),
            model_init_kwargs=shared_model_settings(training_args, model_args),
            held_out=held_out_rows(data, script_args),
            prepare=lambda stage, trainer: _watch_stage(stage, trainer, script_args),
            **{name: getattr(script_args, name) for name in SCHEDULE_SETTINGS},
        )
    return train_stages(schedule, arguments, argv)


def _stages(
    arguments: ParsedArguments, data: Mapping[str, Any], prompts: Any, first: Mapping[str, Any], second: Stage
) -> list[Stage]:
    """The two trainers of a round, each with its configuration on the GPUs that are planned for."""
    script_args, training_args, on_gpus = arguments.script, arguments.training, arguments.script.on_gpus
    pairs, longest = first["pairs"], training_args.max_completion_length
    of_pairs = {"args": first["dpo_args"], "train_dataset": prompts if pairs is None else pairs, **first["dpo_kwargs"]}
    of_policy = {"args": training_args, "train_dataset": prompts, **second.settings}
    dpo_on_gpus = None if on_gpus is None else preference_stage(script_args, on_gpus, data)["dpo_args"]
    return [
        Stage(DPOTrainer, of_pairs, dpo_on_gpus, sampled=longest if pairs is None else 0),
        Stage(second.trainer_class, of_policy, on_gpus),
    ]


def preference_stage(script_args: HybridArguments, training_args: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """
    The keyword arguments of [`DPOThenPPO`] for its first stage, from the arguments under `dpo:` and `pairs:`.

    Raises:
        UserError: for an argument that [`DPOConfig`] doesn't know, or a split that the data set doesn't have.
    """
    dpo, pairs = as_mapping(script_args.dpo, "dpo"), as_mapping(script_args.pairs, "pairs")
    curriculum = load_curriculum(dpo.pop("curriculum", None), dpo.pop("curriculum_column", None))
    splits = {"pairs": pairs.pop("split", None), "eval_pairs": pairs.pop("eval_split", None)}
    names = [f.name for f in fields(DPOConfig)]
    unknown = sorted(dpo.keys() - set(names))
    if unknown:
        raise UserError(f"--dpo has {', '.join(unknown)}, which DPOConfig doesn't know.{nearest(unknown[0], names)}")
    kinds: Any = (DPOConfig,)
    parser = RecipeParser(kinds)
    parser.set_defaults(**{name: getattr(training_args, name) for name in SHARED_BY_STAGES})
    try:
        parser.set_defaults_with_config(**dpo)
        (dpo_args,) = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except ValueError as error:
        raise UserError(f"--dpo: {error}") from error
    return {
        "dpo_args": dpo_args,
        "dpo_kwargs": {"curriculum": curriculum},
        "pair_settings": pairs,
        "clean": None if script_args.clean in ("none", "null") else script_args.clean,
        **{name: None if split is None else get_split(data, split, "pairs") for name, split in splits.items()},
    }


def _watch_stage(stage: str, trainer: Any, script_args: PolicyArguments) -> None:
    """Adds to a stage's trainer the progress lines and checks that the arguments ask for."""
    watch(trainer, script_args, stage)
    if script_args.verify and isinstance(trainer, GRPOTrainer):
        verify(trainer)


def train_stages(schedule: DPOThenPPO, arguments: ParsedArguments, argv: list[str]) -> DPOThenPPO:
    """
    Trains all stages that aren't finished, writes `summary.json`, `stages.png` and a model card, and publishes them.

    Args:
        schedule ([`DPOThenPPO`]):
            The stages.
        arguments ([`ParsedArguments`]):
            Arguments that the schedule was made from.
        argv (`list[str]`):
            The same arguments as words of the command line.

    Returns:
        [`DPOThenPPO`]: `schedule`, after its last stage.
    """
    training_args = arguments.training
    state: Any = PartialState()
    folder, hub_id, is_there = schedule.output_dir, None, False
    if training_args.push_to_hub:
        hub_id = training_args.hub_model_id or folder.name
        if state.is_main_process:  # now, so that a refusal is reported before the training
            try:
                hub_id = create_repo(hub_id, private=training_args.hub_private_repo, exist_ok=True).repo_id
                is_there = True
            except Exception as error:
                if not out_of_reach(error):
                    raise UserError(f"--push_to_hub to '{hub_id}' can't be: {error}") from error
                print(f"The Hub is out of reach ({type(error).__name__}); it is tried again at the end.", flush=True)
    if state.is_main_process:
        write_arguments(folder, arguments)
    schedule.train()
    if state.is_main_process:
        _report_stages(schedule, arguments, argv, hub_id)
    state.print(f"Saved to {folder}.")
    if hub_id is not None and state.is_main_process:
        with uploading(folder, hub_id, NOT_PUSHED, private=training_args.hub_private_repo):
            if not is_there:
                hub_id = create_repo(hub_id, private=training_args.hub_private_repo, exist_ok=True).repo_id
            upload_folder(repo_id=hub_id, folder_path=folder, ignore_patterns=list(NOT_PUSHED))
    leave()
    return schedule


def _expected(expect: dict[str, Any], stages: Sequence[TrainedStage]) -> list[Band]:
    """What is expected of the stages, compared with their logs, those of earlier starts among them."""
    found = []
    for stage in stages:
        bands = Bands(of_stage(expect, stage.name.partition(" ")[0]))  # without the round
        bands.replay(stage.log_history)
        bands.end(stage.steps)
        found += [replace(band, metric=f"{stage.name}/{band.metric}") for band in bands.bands]
    return found


def _report_stages(schedule: DPOThenPPO, arguments: ParsedArguments, argv: list[str], hub_id: str | None) -> None:
    """Writes summary, figure and card, and prints the result of each stage."""
    folder, script_args, model = schedule.output_dir, arguments.script, arguments.model.model_name_or_path
    method, dataset = f"DPO, then {schedule.policy_trainer.__name__.removesuffix('Trainer')}", script_args.dataset_name
    state: Any = PartialState()
    command = command_line(sys.argv[0], argv, state.num_processes)
    summary = summarize_stages(schedule.stages, method, model, dataset, command, script_args.start_name)
    expected = _expected(as_mapping(script_args.expect, "expect"), read_run(folder).stages)
    if expected:
        summary["expected"] = entries(expected)
    write_summary(summary, folder / SUMMARY)
    figure = plot_stages(schedule.stages, folder / "stages.png", f"{method} · {model} · {dataset}")
    section = stages_section(summary, figure.name, config_text(script_args.config_file))
    example, tokenizer = example_of(schedule.train_dataset, schedule.tokenizer), schedule.tokenizer
    section += f"\n{details(read_run(folder), hub_id or as_written(folder), example)}"
    shown = {"tokenizer": tokenizer, "example": example}
    write_stages_card(folder, section, summary, str(model), on_the_hub(dataset), hub_id, **shown)
    for stage in summary["stages"]:
        found = f"{summary['metric']} {stage[summary['metric']]:.3f}"
        print(f"{stage['name']}: {found} ({stage['low']:.3f} to {stage['high']:.3f})")
    print("\n".join([*lines(expected), f"pictures: {figure}"]))
