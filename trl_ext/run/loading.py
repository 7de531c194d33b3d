"""
What arguments name, loaded: functions by import path, rewards, data sets and their splits, curricula, models.
"""

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trl.rewards
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config

from ..curriculum.schedule import DifficultyCurriculum
from ..errors import UserError
from .arguments import DataArguments, PolicyArguments, PPOArguments
from .files import find_file


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

RewardFunc = str | Callable[..., Any]


def load_function(spec: str, argument: str, config_file: Path | None = None) -> Callable[..., Any]:
    """
    Imports a function.

    Args:
        spec (`str`):
            `package.module.function`, also importable from the working directory, or `path/to/file.py:function`, a
            file in one of [`~trl_ext.run.files.places`].
        argument (`str`):
            The argument that names it, for error messages.
        config_file (`Path`, *optional*):
            The yaml file that names it.

    Raises:
        UserError: if it can't be found.
    """
    named = f"--{argument} is '{spec}'"
    if ".py:" in spec:
        path, _, name = spec.rpartition(":")
        file = find_file(path, named, config_file.parent if config_file is not None else None)
        module_name = f"loaded_from_{file.resolve().as_posix()}"
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
            raise UserError(
                f"{named}, but importing '{module_name}' fails: {error}. Write package.module.function or "
                "path/to/file.py:function."
            ) from error
    function = getattr(sys.modules[module_name], name, None)
    if not callable(function):
        raise UserError(f"{named}, but '{name}' is not a function there.")
    return function


def load_reward_funcs(
    script_args: PolicyArguments, training_args: Any, learned: Sequence[str] = ()
) -> list[RewardFunc]:
    """
    Reward functions in the order they are named, reward models as the ids that TRL loads itself.

    Args:
        script_args ([`PolicyArguments`]):
            Their `reward_funcs` and `reward_model_name_or_path` name the rewards.
        training_args ([`~trl.GRPOConfig`]):
            Their completion lengths are those of `get_soft_overlong_punishment`.
        learned (`Sequence[str]`, *optional*):
            Names of rewards that an earlier stage learns. They are returned as names.

    Raises:
        UserError: if none is named, or one can't be found.
    """
    model = script_args.reward_model_name_or_path
    specs = [*filter(None, [model]), *(script_args.reward_funcs or [])]
    if not specs:
        raise UserError("--reward_funcs is missing: name at least one, e.g. `--reward_funcs accuracy_reward`.")
    return [
        spec if spec in learned or spec == model else _load_reward(spec, training_args, script_args.config_file)
        for spec in specs
    ]


def _load_reward(spec: str, training_args: Any, config_file: Path | None) -> RewardFunc:
    if Path(spec).is_dir():
        return spec
    if ".py:" in spec:
        return load_function(spec, "reward_funcs", config_file)
    if spec == "get_soft_overlong_punishment":
        longest = training_args.max_completion_length
        return trl.rewards.get_soft_overlong_punishment(longest, training_args.soft_punish_cache or longest // 5)
    if hasattr(trl.rewards, spec) and not spec.startswith("get_"):
        return getattr(trl.rewards, spec)
    if "/" in spec:  # no dotted path has one: a model on the Hub
        return spec
    if "." in spec:
        return load_function(spec, "reward_funcs")
    raise UserError(
        f"--reward_funcs has '{spec}', which is no reward function of TRL's. Write package.module.function, "
        "path/to/file.py:function, or the id or folder of a reward model."
    )


def load_data(script_args: DataArguments, mixture_args: DatasetMixtureConfig) -> Mapping[str, Any]:
    """
    Loads the data set, or TRL's mixture of several, as a mapping from split to data set, and prepares its rows.

    Raises:
        UserError: if no data set is named, or its form can't be read.
    """
    data: Any = get_dataset(mixture_args) if mixture_args.datasets else _read(script_args)
    splits: Mapping[str, Any] = (
        {script_args.dataset_train_split: data} if isinstance(data, Dataset | IterableDataset) else data
    )
    if script_args.prepare_row is None:
        return splits
    prepare = load_function(script_args.prepare_row, "prepare_row", script_args.config_file)
    return {split: rows.map(prepare) for split, rows in splits.items()}


def _read(script_args: DataArguments) -> Any:
    """The data set that is named, or its splits."""
    name: Any = script_args.dataset_name
    streaming: Any = script_args.dataset_streaming
    if name is None:
        raise UserError("--dataset_name is missing. Give a Hub id, a folder written by save_to_disk, or a file.")
    if Path(name).is_file():
        if Path(name).suffix not in FILE_FORMATS:
            raise UserError(f"--dataset_name is '{name}', but only {', '.join(FILE_FORMATS)} files can be read.")
        return load_dataset(FILE_FORMATS[Path(name).suffix], data_files=name, streaming=streaming)
    if any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        if streaming:
            raise UserError("--dataset_streaming doesn't apply to a folder written by save_to_disk: it isn't copied.")
        return load_from_disk(name)
    return load_dataset(name, name=script_args.dataset_config, streaming=streaming)


def get_split(data: Mapping[str, Any], split: str, argument: str) -> Any:
    """One split of the data. Raises `UserError` naming the argument and the splits there are."""
    if split not in data:
        raise UserError(f"--{argument} is '{split}', but the data set has only: {', '.join(data)}.")
    return data[split]


def load_curriculum(schedule: str | None, column: str | None) -> DifficultyCurriculum | None:
    """The curriculum that `curriculum` and `curriculum_column` ask for. Raises `UserError` for a lone column."""
    if schedule is not None:
        return DifficultyCurriculum(schedule, column)
    if column is not None:
        raise UserError("curriculum_column is set, but curriculum isn't. Set curriculum, e.g. to easy_to_hard.")
    return None


def model_settings(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """How a model is loaded, from the command line's arguments."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def shared_model_settings(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """[`model_settings`] of a model that several trainers share, quantization included."""
    quantization = get_quantization_config(model_args)
    return model_settings(training_args, model_args) | ({"quantization_config": quantization} if quantization else {})


def trainer_arguments(
    script_args: DataArguments, training_args: Any, model_args: ModelConfig, data: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments that all of TRL's trainers take. What is passed in isn't changed."""
    own = copy.copy(training_args)
    own.model_init_kwargs = model_settings(training_args, model_args)
    evaluates = training_args.eval_strategy != "no"
    return {
        "model": model_args.model_name_or_path,
        "args": own,
        "train_dataset": get_split(data, script_args.dataset_train_split, "dataset_train_split"),
        "eval_dataset": get_split(data, script_args.dataset_test_split, "dataset_test_split") if evaluates else None,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def ppo_arguments(script_args: PPOArguments, reward_funcs: Sequence[RewardFunc]) -> dict[str, Any]:
    """
    The keyword arguments that [`~trl_ext.PPOTrainer`] takes beside those that all trainers take.

    Raises:
        UserError: if the text of `ptx_dataset_name` can't be loaded.
    """
    reward_model, text = script_args.reward_model_name_or_path, None
    if script_args.ptx_dataset_name is not None:
        data = load_data(DataArguments(dataset_name=script_args.ptx_dataset_name), DatasetMixtureConfig())
        text = get_split(data, script_args.ptx_dataset_split, "ptx_dataset_split")
    return {
        "reward_funcs": [func for func in reward_funcs if func != reward_model],
        "reward_model": reward_model,
        "value_model": script_args.value_model_name_or_path,
        "ptx_dataset": text,
    }
