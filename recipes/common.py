"""
What the recipes share: arguments, data, reward functions, held-out evaluation, and what a run leaves in its folder.

A recipe names a method; everything else is here once.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import trl.rewards
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from huggingface_hub import create_repo, upload_folder
from transformers.trainer_utils import has_length
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from trl_ext import DifficultyCurriculum, DPOConfig, DPOThenPPO, GRPOTrainer, HealthChecks
from trl_ext.evaluation.credit import TokenCredit, credit_by_token
from trl_ext.evaluation.held_out import Estimate, HeldOut
from trl_ext.evaluation.pairs import read_pair_accuracy
from trl_ext.monitors.progress import ProgressLines
from trl_ext.monitors.verify import verify
from trl_ext.pipelines.dpo_then_ppo import IMPLICIT_REWARD
from trl_ext.reports.card import results_section, stages_section, write_stages_card
from trl_ext.reports.plots import plot_learning, plot_stages, plot_tokens
from trl_ext.reports.summary import summarize, summarize_stages, write_summary


# TRL's defaults are made for GPUs.
WITHOUT_ACCELERATOR = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
SHARED_BY_STAGES = (
    *("output_dir", "use_cpu", "bf16", "fp16", "gradient_checkpointing", "gradient_checkpointing_kwargs", "seed"),
    *("report_to", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm"),
)
SCHEDULE_SETTINGS = (
    *("reference", "rounds", "accuracy_threshold", "accuracy_logs"),
    *("held_out_samples", "held_out_every", "held_out_seed"),
)
DEFAULTS = DPOThenPPO.__init__.__kwdefaults__
METHODS = ("PPO", "GRPO", "DAPO", "DUPO", "GSPO")  # that a schedule can end with
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

# ... for the picture of single completions
COMPLETIONS_TO_CHOOSE_FROM = 32

RewardFunc = str | Callable[..., Any]


@dataclass
class DataArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] plus what local runs need. `dataset_name` may also be a folder written by `save_to_disk`,
    or a json, jsonl, csv or parquet file.

    Args:
        prepare_row (`str`, *optional*):
            Function applied to every row, e.g. to build `prompt` from other columns: `package.module.function` or
            `path/to/file.py:function`. It takes a row and returns the columns to add or replace.
        cpu_threads (`int`, *optional*):
            Threads PyTorch computes with when there is no accelerator. Tiny models are fastest with 1.
    """

    prepare_row: str | None = field(
        default=None, metadata={"help": "Function applied to every row: module.function or file.py:function."}
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads PyTorch computes with when there is no accelerator."}
    )


@dataclass
class PolicyArguments(DataArguments):
    """
    Arguments of the recipes that sample completions and score them.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `package.module.function`, `path/to/file.py:function`, the name of one of TRL's
            (`accuracy_reward`, `think_format_reward`, ...), or the Hub id or folder of a reward model.
        reward_model_name_or_path (`str`, *optional*):
            One more reward model, as in TRL's own scripts.
        held_out_prompts (`int`, *optional*, defaults to `256`):
            Prompts of the test split on which the policy is measured before and after training. 0: none.
        held_out_samples (`int`, *optional*, defaults to `4`):
            Completions sampled for each, at the training temperature.
        held_out_every (`int`, *optional*, defaults to `0`):
            Also measure every so many optimizer steps. 0: only before and after.
        held_out_seed (`int`, *optional*, defaults to `0`):
            Chooses the prompts and the samples, the same ones at every measurement.
        curriculum, curriculum_column (`str`, *optional*):
            Schedule and column of a [`~trl_ext.DifficultyCurriculum`].
        health_checks (`bool`, *optional*, defaults to `False`):
            Watch KL, preference accuracy, entropy, reward hacking, length and the critic, and warn
            ([`~trl_ext.HealthChecks`]).
        verify (`bool`, *optional*, defaults to `False`):
            Before training, measure on one step that the gradient is TRL's, and what time and memory are saved
            (`trl_ext.verify`).
    """

    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "module.function, file.py:function, TRL's names, or reward model ids."}
    )
    reward_model_name_or_path: str | None = field(default=None, metadata={"help": "One more reward model."})
    held_out_prompts: int = field(
        default=256, metadata={"help": "Prompts of the test split to measure on before and after. 0: none."}
    )
    held_out_samples: int = field(default=4, metadata={"help": "Completions sampled for each held-out prompt."})
    held_out_every: int = field(default=0, metadata={"help": "Also measure every so many optimizer steps."})
    held_out_seed: int = field(default=0, metadata={"help": "Chooses the held-out prompts and the samples."})
    curriculum: str | None = field(default=None, metadata={"help": "'easy_to_hard', 'frontier' or 'mixed'."})
    curriculum_column: str | None = field(default=None, metadata={"help": "Column that says how hard a row is."})
    health_checks: bool = field(default=False, metadata={"help": "Warn when the run leaves the road."})
    verify: bool = field(
        default=False, metadata={"help": "Measure first that the gradient is TRL's, and what is saved."}
    )


def parse_arguments(
    script_class: type, config_class: type, argv: list[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """
    Reads the command line and the yaml file named by `--config`; the command line wins.

    Args:
        script_class (`type`):
            [`DataArguments`] or a subclass.
        config_class (`type`):
            The trainer's configuration class.
        argv (`list[str]`, *optional*):
            Arguments without the program's name, by default those of the process.
        defaults (`Mapping[str, Any]`, *optional*):
            What a recipe sets otherwise than the classes.

    Returns:
        Script arguments, training arguments, [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`].

    Raises:
        `ValueError`: if no model is named, or the yaml file has an argument that doesn't exist.
    """
    parser = TrlParser((script_class, config_class, ModelConfig, DatasetMixtureConfig))
    has_accelerator = torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if not has_accelerator:
        parser.set_defaults(**WITHOUT_ACCELERATOR)
    parser.set_defaults(**(defaults or {}))
    script_args, training_args, model_args, mixture_args = parser.parse_args_and_config(argv)
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing. Give the Hub id or the folder of the model to train.")
    if training_args.hub_token is not None:
        # The trainer saves its arguments beside the model and pushes them: the token must not be among them
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if not has_accelerator:
        if script_args.cpu_threads is not None:
            torch.set_num_threads(script_args.cpu_threads)
        settings = ", ".join(f"{name}={getattr(training_args, name)}" for name in WITHOUT_ACCELERATOR)
        if training_args.process_index == 0:
            print(f"No accelerator in use: {settings}, {torch.get_num_threads()} thread(s) per process.", flush=True)
    return script_args, training_args, model_args, mixture_args


def peek(argv: list[str], name: str, choices: tuple[str, ...]) -> str:
    """
    An argument that decides which other arguments there are: of the command line, or of the yaml file; by default the
    first choice. Raises `ValueError` if it is none of them.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for argument in ("config", name):
        parser.add_argument(f"--{argument}")
    given = vars(parser.parse_known_args(argv)[0])
    if given[name] is None and given["config"] is not None:
        given[name] = yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8")).get(name)
    found = choices[0] if given[name] is None else given[name]
    if found not in choices:
        raise ValueError(f"--{name} is '{found}'. Choose one of {', '.join(choices)}.")
    return str(found)


def as_mapping(value: dict[str, Any] | str | None, argument: str) -> dict[str, Any]:
    """Arguments within an argument: a mapping in the yaml file, JSON on the command line."""
    try:
        found = json.loads(value) if isinstance(value, str) else dict(value or {})
    except ValueError as error:
        raise ValueError(f"--{argument} is '{value}', which is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"--{argument} is '{value}'. Write a mapping, such as '{{\"name\": 1}}'.")
    return found


def load_function(spec: str, argument: str) -> Callable[..., Any]:
    """
    Imports a function.

    Args:
        spec (`str`):
            `package.module.function`, also importable from the working directory, or `path/to/file.py:function`.
        argument (`str`):
            The argument that names it, for error messages.

    Raises:
        `ValueError`: if it can't be found.
    """
    if ".py:" in spec:
        file, _, name = spec.rpartition(":")
        if not Path(file).is_file():
            raise ValueError(f"--{argument} is '{spec}', but there is no file '{file}' in '{Path.cwd()}'.")
        module_name = f"loaded_from_{Path(file).resolve().as_posix()}"
        if module_name not in sys.modules:
            module_spec = importlib.util.spec_from_file_location(module_name, file)
            assert module_spec is not None and module_spec.loader is not None
            sys.modules[module_name] = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(sys.modules[module_name])
    else:
        module_name, _, name = spec.rpartition(".")
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"--{argument} is '{spec}', but importing '{module_name}' fails: {error}. Write "
                "package.module.function or path/to/file.py:function."
            ) from error
    function = getattr(sys.modules[module_name], name, None)
    if not callable(function):
        raise ValueError(f"--{argument} is '{spec}', but '{name}' is not a function there.")
    return function


def load_reward_funcs(script_args: PolicyArguments, training_args: Any) -> list[RewardFunc]:
    """
    Reward functions in the order they are named, reward models as the ids that TRL loads itself.

    Raises:
        `ValueError`: if none is named, or one can't be found.
    """
    specs = [*filter(None, [script_args.reward_model_name_or_path]), *(script_args.reward_funcs or [])]
    if not specs:
        raise ValueError("--reward_funcs is missing: name at least one, e.g. `--reward_funcs accuracy_reward`.")
    learned = [IMPLICIT_REWARD] if hasattr(script_args, "dpo") else []  # in a stage before
    model = script_args.reward_model_name_or_path
    return [spec if spec in learned else _load_reward(spec, training_args, model) for spec in specs]


def _load_reward(spec: str, training_args: Any, reward_model: str | None) -> RewardFunc:
    if spec == reward_model or Path(spec).is_dir():
        return spec
    if ".py:" in spec:
        return load_function(spec, "reward_funcs")
    if spec == "get_soft_overlong_punishment":
        longest = training_args.max_completion_length
        return trl.rewards.get_soft_overlong_punishment(longest, training_args.soft_punish_cache or longest // 5)
    if hasattr(trl.rewards, spec) and not spec.startswith("get_"):
        return getattr(trl.rewards, spec)
    if "/" in spec:  # no dotted path has one: a model on the Hub
        return spec
    if "." in spec:
        return load_function(spec, "reward_funcs")
    raise ValueError(
        f"--reward_funcs has '{spec}', which is no reward function of TRL's. Write package.module.function, "
        "path/to/file.py:function, or the id or folder of a reward model."
    )


def load_data(script_args: DataArguments, mixture_args: DatasetMixtureConfig) -> Mapping[str, Any]:
    """
    Loads the data set, or TRL's mixture of several, as a mapping from split to data set, and prepares its rows.

    Raises:
        `ValueError`: if none is named, or one with this name isn't there in a form that can be read.
    """
    name = script_args.dataset_name
    if mixture_args.datasets:
        data = get_dataset(mixture_args)
    elif name is None:
        raise ValueError("--dataset_name is missing. Give a Hub id, a folder written by save_to_disk, or a file.")
    elif Path(name).is_file():
        if Path(name).suffix not in FILE_FORMATS:
            raise ValueError(f"--dataset_name is '{name}', but only {', '.join(FILE_FORMATS)} files can be read.")
        data = load_dataset(FILE_FORMATS[Path(name).suffix], data_files=name, streaming=script_args.dataset_streaming)
    elif any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        data = load_from_disk(name)
        if script_args.dataset_streaming:
            raise ValueError("--dataset_streaming doesn't apply to a folder written by save_to_disk: it isn't copied.")
    else:
        data = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    if isinstance(data, Dataset | IterableDataset):
        data = {script_args.dataset_train_split: data}
    if script_args.prepare_row is not None:
        prepare = load_function(script_args.prepare_row, "prepare_row")
        data = {split: rows.map(prepare) for split, rows in data.items()}
    return data


def curriculum_of(schedule: str | None, column: str | None) -> DifficultyCurriculum | None:
    """The curriculum that was asked for by `curriculum` and `curriculum_column`."""
    if schedule is not None:
        return DifficultyCurriculum(schedule, column)
    if column is not None:
        raise ValueError("curriculum_column is there, but no curriculum: set it, e.g. to easy_to_hard.")
    return None


def get_split(data: Mapping[str, Any], split: str, argument: str) -> Any:
    """One split of the data. Raises `ValueError` naming the argument and the splits there are."""
    if split not in data:
        raise ValueError(f"--{argument} is '{split}', but the data set has only: {', '.join(data)}.")
    return data[split]


def trainer_arguments(
    script_args: DataArguments, training_args: Any, model_args: ModelConfig, data: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments that all of TRL's trainers take, from the command line's."""
    training_args.model_init_kwargs = model_settings(training_args, model_args)
    evaluates = training_args.eval_strategy != "no"
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": get_split(data, script_args.dataset_train_split, "dataset_train_split"),
        "eval_dataset": get_split(data, script_args.dataset_test_split, "dataset_test_split") if evaluates else None,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def stage_model_settings(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """The same for a model that several trainers share, quantization included."""
    quantization = get_quantization_config(model_args)
    return model_settings(training_args, model_args) | ({"quantization_config": quantization} if quantization else {})


def watch_stage(trainer: Any, script_args: PolicyArguments) -> None:
    """What is asked for of every trainer of a run of several stages."""
    watch(trainer, script_args.health_checks)
    if script_args.verify and isinstance(trainer, GRPOTrainer):
        verify(trainer)


def model_settings(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """How a model is loaded, from the command line's arguments."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def preference_stage(script_args: Any, training_args: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a schedule takes for its first stage, from the arguments under `dpo:` and `pairs:`."""
    dpo, pairs = as_mapping(script_args.dpo, "dpo"), as_mapping(script_args.pairs, "pairs")
    curriculum = curriculum_of(dpo.pop("curriculum", None), dpo.pop("curriculum_column", None))
    splits = {"pairs": pairs.pop("split", None), "eval_pairs": pairs.pop("eval_split", None)}
    unknown = sorted(dpo.keys() - {f.name for f in fields(DPOConfig)})
    if unknown:
        raise ValueError(f"--dpo has {', '.join(unknown)}, which DPOConfig doesn't know.")
    return {
        "dpo_args": DPOConfig(**{name: getattr(training_args, name) for name in SHARED_BY_STAGES} | dpo),
        "dpo_kwargs": {"curriculum": curriculum},
        "pair_settings": pairs,
        "clean": None if script_args.clean in ("none", "null") else script_args.clean,
        **{name: None if split is None else get_split(data, split, "pairs") for name, split in splits.items()},
    }


def watch(trainer: Any, health_checks: bool) -> None:
    """Progress on single lines, and health checks where they are asked for."""
    ProgressLines.instead_of_bars(trainer)
    if health_checks:
        HealthChecks().add_to(trainer)


def fit(trainer: Any, health_checks: bool = False) -> None:
    """
    Trains, from `--resume_from_checkpoint` if given (a folder, or `true` for the last one in the output folder), and
    saves, before anything that comes after can fail.
    """
    watch(trainer, health_checks)
    checkpoint = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint))
    trainer.save_model(trainer.args.output_dir)


def pair_accuracy(trainer: Any) -> dict[int, dict[str, Estimate]]:
    """On held-out pairs, by optimizer step; empty if there are none, or nobody counted them, as in a stream."""
    pairs = trainer.eval_dataset
    return read_pair_accuracy(trainer.state.log_history, len(pairs)) if has_length(pairs) else {}


def publish(trainer: Any, dataset_name: str | None) -> None:
    """Writes a card beside the model, and both to the Hub if `--push_to_hub` is given."""
    if dataset_name is not None and Path(dataset_name).exists():
        dataset_name = None  # the card links it on the Hub, where it isn't
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    else:
        trainer.create_model_card(model_name=Path(trainer.args.output_dir).name, dataset_name=dataset_name)
    trainer.accelerator.print(f"Saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")
    leave(trainer)


def leave(trainer: Any = None) -> None:
    """The last that a recipe does with other processes: finishes a trainer's trackers and the processes' group."""
    if trainer is not None:
        trainer.accelerator.end_training()
    state = PartialState()
    state.destroy_process_group()
    if state.num_processes > 1:
        # A thread of gloo that lets go of its last tensor when the interpreter is gone aborts the process
        time.sleep(0.1)


def train_policy(
    trainer_class: type,
    config_class: type,
    argv: list[str] | None = None,
    *,
    script_class: type = PolicyArguments,
    defaults: Mapping[str, Any] | None = None,
    roles: Callable[[Any, list[RewardFunc]], dict[str, Any]] | None = None,
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
            What the recipe sets otherwise than the classes.
        roles (`Callable`, *optional*):
            From script arguments and reward functions to further arguments of the trainer; they win.

    Returns:
        The trainer, after training.
    """
    started = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    parsed = parse_arguments(script_class, config_class, argv, defaults)
    script_args, training_args, model_args, mixture_args = parsed
    data = load_data(script_args, mixture_args)
    reward_funcs = load_reward_funcs(script_args, training_args)
    trainer = trainer_class(
        **trainer_arguments(script_args, training_args, model_args, data),
        **{"reward_funcs": reward_funcs, **(roles(script_args, reward_funcs) if roles is not None else {})},
        curriculum=curriculum_of(script_args.curriculum, script_args.curriculum_column),
    )
    held_out = _add_held_out(trainer, data, script_args)
    if script_args.verify:
        verify(trainer)
    fit(trainer, script_args.health_checks)
    credits = _credits(trainer, data, script_args)

    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        launch = _launch(trainer.accelerator.num_processes)
        summary = summarize(
            trainer,
            held_out.measured if held_out is not None else {},
            seconds=time.monotonic() - started,
            model=model_args.model_name_or_path,
            dataset=script_args.dataset_name,
            command=shlex.join([*launch, sys.argv[0], *argv]),
            reward_model=script_args.reward_model_name_or_path,
        )
        write_summary(summary, folder / "summary.json")
        title = f"{summary['method']} · {model_args.model_name_or_path} · {script_args.dataset_name}"
        figure = plot_learning(trainer.state.log_history, folder / "learning.png", title)
        example = next(iter(trainer.train_dataset))["prompt"]
        section = results_section(
            summary,
            figure.name,
            _config(argv),
            example if isinstance(example, str) else None,
            plot_tokens(credits, folder / "tokens.png", title).name if credits else None,
        )
        trainer.card_sections.append(lambda: section)
    publish(trainer, script_args.dataset_name)
    return trainer


def _credits(trainer: Any, data: Mapping[str, Any], script_args: PolicyArguments) -> list[TokenCredit]:
    """Where there is a critic: the best and the worst scored of the longer half of a few completions."""
    if getattr(trainer, "critic", None) is None:
        return []
    rows = data.get(script_args.dataset_test_split, data[script_args.dataset_train_split])
    rows = list(rows.shuffle(seed=script_args.held_out_seed).take(COMPLETIONS_TO_CHOOSE_FROM))
    credits = sorted(credit_by_token(trainer, rows, script_args.held_out_seed), key=lambda credit: len(credit.tokens))
    by_score = sorted(credits[len(credits) // 2 :], key=lambda credit: credit.score)
    return [by_score[-1], by_score[0]]


def train_stages(run: DPOThenPPO, parsed: tuple[Any, ...], argv: list[str]) -> DPOThenPPO:
    """Runs several stages, writes what they leave (`summary.json`, `stages.png`, a card), and publishes it."""
    script_args, training_args, model_args, _ = parsed
    state, folder, model = PartialState(), run.output_dir, model_args.model_name_or_path
    hub_id = training_args.hub_model_id or folder.name
    if training_args.push_to_hub and state.is_main_process:  # now, so that what forbids it is told before the training
        hub_id = create_repo(hub_id, private=training_args.hub_private_repo, exist_ok=True).repo_id
    run.train()
    if state.is_main_process:
        method = f"DPO, then {run.policy_trainer._name}"
        command = shlex.join([*_launch(state.num_processes), sys.argv[0], *argv])
        named = method, model, script_args.dataset_name, command, script_args.start_name
        summary = summarize_stages(run.stages, *named)
        write_summary(summary, folder / "summary.json")
        figure = plot_stages(run.stages, folder / "stages.png", f"{method} · {model} · {script_args.dataset_name}")
        section = stages_section(summary, figure.name, _config(argv))
        dataset = None if Path(str(script_args.dataset_name)).exists() else script_args.dataset_name
        write_stages_card(folder, section, summary, model, dataset, hub_id if training_args.push_to_hub else "")
        for stage in summary["stages"]:
            found = f"{summary['metric']} {stage[summary['metric']]:.3f}"
            print(f"{stage['name']}: {found} ({stage['low']:.3f} to {stage['high']:.3f})")
        if training_args.push_to_hub:
            commit = upload_folder(repo_id=hub_id, folder_path=folder, ignore_patterns=["round_*", "start*"])
            print(f"Pushed to {commit.repo_url}.")
    state.print(f"Saved to {folder}.")
    leave()
    return run


def _launch(processes: int) -> list[str]:
    return ["accelerate", "launch", *(["--num_processes", str(processes)] if processes > 1 else [])]


def _config(argv: list[str]) -> str | None:
    """The text of the yaml file."""
    return Path(argv[argv.index("--config") + 1]).read_text(encoding="utf-8") if "--config" in argv else None


def held_out_rows(data: Mapping[str, Any], script_args: PolicyArguments) -> Any:
    """A seeded choice of test prompts, `None` if none are asked for or there."""
    if script_args.held_out_prompts == 0:
        return None
    if script_args.dataset_test_split not in data:
        PartialState().print(
            f"No held-out evaluation: the data set has no split '{script_args.dataset_test_split}' "
            f"(--dataset_test_split), only {', '.join(data)}."
        )
        return None
    prompts = data[script_args.dataset_test_split].shuffle(seed=script_args.held_out_seed)
    return prompts.take(script_args.held_out_prompts)


def _add_held_out(trainer: Any, data: Mapping[str, Any], script_args: PolicyArguments) -> HeldOut | None:
    """Has the policy measured on a seeded choice of test prompts, in batches as large as those of training."""
    prompts = held_out_rows(data, script_args)
    if prompts is None:
        return None
    held_out = HeldOut(
        trainer,
        list(prompts),
        num_samples=script_args.held_out_samples,
        batch_size=max(1, trainer.args.generation_batch_size // script_args.held_out_samples),
        seed=script_args.held_out_seed,
        every=script_args.held_out_every,
    )
    trainer.add_callback(held_out)
    return held_out
