"""
What the recipes share: arguments, data, reward functions, held-out evaluation, and what a run leaves in its folder.

A recipe names a method; everything else is here once.
"""

import importlib
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl.rewards
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from trl_ext.evaluation.credit import TokenCredit, credit_by_token
from trl_ext.evaluation.held_out import HeldOut
from trl_ext.monitors.progress import ProgressLines
from trl_ext.monitors.verify import verify
from trl_ext.reports.card import results_section
from trl_ext.reports.plots import plot_learning, plot_tokens
from trl_ext.reports.summary import summarize, write_summary


# TRL's defaults are made for GPUs.
WITHOUT_ACCELERATOR = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
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
    return [_load_reward(spec, training_args, script_args.reward_model_name_or_path) for spec in specs]


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


def get_split(data: Mapping[str, Any], split: str, argument: str) -> Any:
    """One split of the data. Raises `ValueError` naming the argument and the splits there are."""
    if split not in data:
        raise ValueError(f"--{argument} is '{split}', but the data set has only: {', '.join(data)}.")
    return data[split]


def trainer_arguments(
    script_args: DataArguments, training_args: Any, model_args: ModelConfig, data: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments that all of TRL's trainers take, from the command line's."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluates = training_args.eval_strategy != "no"
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": get_split(data, script_args.dataset_train_split, "dataset_train_split"),
        "eval_dataset": get_split(data, script_args.dataset_test_split, "dataset_test_split") if evaluates else None,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def fit(trainer: Any) -> None:
    """Trains, from `--resume_from_checkpoint` if given: a folder, or `true` for the last one in the output folder."""
    ProgressLines.instead_of_bars(trainer)
    checkpoint = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint))


def save(trainer: Any, dataset_name: str | None) -> None:
    """Writes model, tokenizer and card into the output folder, and to the Hub if `--push_to_hub` is given."""
    if dataset_name is not None and Path(dataset_name).exists():
        dataset_name = None  # the card links it on the Hub, where it isn't
    trainer.save_model(trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    else:
        trainer.create_model_card(model_name=Path(trainer.args.output_dir).name, dataset_name=dataset_name)
    trainer.accelerator.print(f"Saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # transformers 5.18 and later: finishes the trackers and the process group
        trainer.end()


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
    )
    held_out = _add_held_out(trainer, data, script_args)
    if script_args.verify:
        verify(trainer)
    fit(trainer)
    credits = _credits(trainer, data, script_args)

    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        processes = trainer.accelerator.num_processes
        launch = ["accelerate", "launch", *(["--num_processes", str(processes)] if processes > 1 else [])]
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
        config = Path(argv[argv.index("--config") + 1]).read_text(encoding="utf-8") if "--config" in argv else None
        example = next(iter(trainer.train_dataset))["prompt"]
        section = results_section(
            summary,
            figure.name,
            config,
            example if isinstance(example, str) else None,
            plot_tokens(credits, folder / "tokens.png", title).name if credits else None,
        )
        trainer.card_sections.append(lambda: section)
    save(trainer, script_args.dataset_name)
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


def _add_held_out(trainer: Any, data: Mapping[str, Any], script_args: PolicyArguments) -> HeldOut | None:
    """Has the policy measured on a seeded choice of test prompts, in batches as large as those of training."""
    if script_args.held_out_prompts == 0:
        return None
    if script_args.dataset_test_split not in data:
        trainer.accelerator.print(
            f"No held-out evaluation: the data set has no split '{script_args.dataset_test_split}' "
            f"(--dataset_test_split), only {', '.join(data)}."
        )
        return None
    prompts = data[script_args.dataset_test_split].shuffle(seed=script_args.held_out_seed)
    held_out = HeldOut(
        trainer,
        list(prompts.take(script_args.held_out_prompts)),
        num_samples=script_args.held_out_samples,
        batch_size=max(1, trainer.args.generation_batch_size // script_args.held_out_samples),
        seed=script_args.held_out_seed,
        every=script_args.held_out_every,
    )
    trainer.add_callback(held_out)
    return held_out
