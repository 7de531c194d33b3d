"""
What arguments name, loaded: functions by import path, rewards, data sets and their splits, curricula, models.
"""

import ast
import copy
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trl.rewards
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config

from ..curriculum.schedule import DifficultyCurriculum
from ..errors import UserError
from ..rewards import reasoning_gym
from ..rewards.adapter import AdapterReward
from ..roles.reward_adapter import REWARD_ADAPTER, is_adapter
from .arguments import DataArguments, PolicyArguments, PPOArguments
from .files import find_file


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
GYM = "reasoning_gym:"  # what a data set's name begins with that is made of Reasoning Gym's tasks
MODEL_FILES = ("config.json", "adapter_config.json")

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
            _run_file(file, module_name, named)
    elif spec.endswith(".py"):
        found = find_file(spec, named, config_file.parent if config_file is not None else None)
        functions = [f"{spec}:{node.name}" for node in _statements(found, named) if isinstance(node, ast.FunctionDef)]
        instead = f"one of {', '.join(functions)}" if functions else f"{spec}:function"
        raise UserError(f"{named}, which names a file and no function. Write {instead}.")
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
        defined = [key for key, value in vars(sys.modules[module_name]).items() if callable(value) and key[0] != "_"]
        close = difflib.get_close_matches(name, defined, n=1)
        asked = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"{named}, but '{name}' is not a function there.{asked}")
    return function


def _run_file(file: Path, module_name: str, named: str) -> None:
    """Imports a file as a module of that name."""
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    assert module_spec is not None and module_spec.loader is not None
    sys.modules[module_name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(sys.modules[module_name])
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(f"{named}, but running '{file}' fails: {type(error).__name__}: {error}.") from error


def _statements(file: Path, named: str) -> list[ast.stmt]:
    """The top level of a file, which isn't run."""
    try:
        return ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{named}, but '{file}' is no Python: {error}.") from error


def load_reward_funcs(
    script_args: PolicyArguments, training_args: Any, learned: Sequence[str] = (), *, has_adapter: bool = False
) -> list[RewardFunc]:
    """
    Reward functions in the order they are named, reward models as the ids that TRL loads itself, or as adapters of the
    policy.

    Args:
        script_args ([`PolicyArguments`]):
            Their `reward_funcs` and `reward_model_name_or_path` name the rewards.
        training_args ([`~trl.GRPOConfig`]):
            Their completion lengths are those of `get_soft_overlong_punishment`.
        learned (`Sequence[str]`, *optional*):
            Names of rewards that an earlier stage learns. They are returned as names.
        has_adapter (`bool`, *optional*, defaults to `False`):
            Whether the policy is trained with an adapter. `share_reward_base` decides otherwise.

    Raises:
        UserError: if none is named, or one can't be found or is no reward model.
    """
    model = script_args.reward_model_name_or_path
    specs = [*filter(None, [model]), *(script_args.reward_funcs or [])]
    if not specs:
        raise UserError("--reward_funcs is missing: name at least one, e.g. `--reward_funcs accuracy_reward`.")
    funcs: list[RewardFunc] = [
        spec if spec in learned or spec == model else _load_reward(spec, training_args, script_args.config_file)
        for spec in specs
    ]
    if script_args.share_reward_base and not any(map(is_adapter, funcs)):
        raise UserError(
            "--share_reward_base is true, but no reward is the folder of an adapter. Train one with recipes/reward.py "
            "--use_peft true, and name it with --reward_model_name_or_path, or leave --share_reward_base out."
        )
    shares = has_adapter if script_args.share_reward_base is None else script_args.share_reward_base
    return _on_policys_base(funcs) if shares else funcs


def _on_policys_base(funcs: list[RewardFunc]) -> list[RewardFunc]:
    """Reward models that are folders of adapters, as adapters of the policy, each under a name of its own."""
    names = iter([REWARD_ADAPTER, *(f"{REWARD_ADAPTER}_{number}" for number in range(2, len(funcs) + 2))])
    try:
        return [AdapterReward(func, adapter=next(names)) if is_adapter(func) else func for func in funcs]
    except ValueError as error:
        raise UserError(str(error)) from error


def _load_reward(spec: str, training_args: Any, config_file: Path | None) -> RewardFunc:
    if Path(spec).is_dir():
        return spec
    if ".py:" in spec or spec.endswith(".py"):
        return load_function(spec, "reward_funcs", config_file)
    if spec == "get_soft_overlong_punishment":
        longest = training_args.max_completion_length
        return trl.rewards.get_soft_overlong_punishment(longest, training_args.soft_punish_cache or longest // 5)
    if spec == reasoning_gym.reasoning_gym_reward.__name__:
        return reasoning_gym.reasoning_gym_reward
    if callable(getattr(trl.rewards, spec, None)) and not spec.startswith("get_"):
        return getattr(trl.rewards, spec)
    if "/" in spec:  # no dotted path has one: a model on the Hub
        return spec
    if "." in spec:
        return load_function(spec, "reward_funcs")
    known = [
        reasoning_gym.reasoning_gym_reward.__name__,
        *(name for name in dir(trl.rewards) if name.endswith("_reward")),
    ]
    close = difflib.get_close_matches(spec, known, n=1)
    raise UserError(
        f"--reward_funcs has '{spec}', which is no reward function of TRL's"
        f"{f' (did you mean {close[0]}?)' if close else ''}. Write package.module.function, path/to/file.py:function, "
        "or the id or folder of a reward model."
    )


def load_data(
    script_args: DataArguments, mixture_args: DatasetMixtureConfig, columns: Sequence[str] = ()
) -> Mapping[str, Any]:
    """
    Loads the data set, or TRL's mixture of several, as a mapping from split to data set, and prepares its rows.

    Args:
        script_args ([`DataArguments`]):
            They name it.
        mixture_args ([`~trl.DatasetMixtureConfig`]):
            The mixture, if there is one.
        columns (`Sequence[str]`, *optional*):
            Columns that the rows to train on need.

    Raises:
        UserError: if no data set is named, it can't be read, has no rows, or lacks a column.
    """
    splits = _splits(get_dataset(mixture_args) if mixture_args.datasets else _read(script_args), script_args)
    rows = get_split(splits, script_args.dataset_train_split, "dataset_train_split")
    split = f"The split '{script_args.dataset_train_split}' of {script_args.dataset_name or 'the mixture'}"
    first = next(iter(rows), None)
    if first is None:
        raise UserError(f"{split} has no rows. Name another with --dataset_train_split.")
    missing = [column for column in columns if column not in first]
    if missing:
        raise UserError(
            f"{split} has no column {' and no column '.join(missing)}, only {', '.join(first)}. Name a split that has "
            "them with --dataset_train_split, or make them with --prepare_row."
        )
    return splits


def _splits(data: Any, script_args: DataArguments) -> Mapping[str, Any]:
    """A data set or several by split, every row with what the function of `prepare_row` returns."""
    splits: Mapping[str, Any] = (
        {script_args.dataset_train_split: data} if isinstance(data, Dataset | IterableDataset) else data
    )
    if script_args.prepare_row is None:
        return splits
    prepare = load_function(str(script_args.prepare_row), "prepare_row", script_args.config_file)
    try:
        return {split: rows.map(prepare) for split, rows in splits.items()}
    except Exception as error:  # the user's function
        raise UserError(
            f"--prepare_row is '{script_args.prepare_row}', which fails on the rows of {script_args.dataset_name}: "
            f"{type(error).__name__}: {error}."
        ) from error


def _read(script_args: DataArguments, argument: str = "dataset_name") -> Any:
    """The data set that is named, or its splits."""
    name: Any = script_args.dataset_name
    streaming: Any = script_args.dataset_streaming
    if name is None:
        raise UserError(f"--{argument} is missing. Give a Hub id, a folder written by save_to_disk, or a file.")
    named, path = f"--{argument} is '{name}'", Path(name)
    if name.startswith(GYM):
        if streaming:
            raise UserError(f"--dataset_streaming doesn't apply to {name}: it is made, not read.")
        return _of_the_gym(name, script_args.dataset_config, named)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise UserError(f"{named}, but only {', '.join(FILE_FORMATS)} files can be read.")
        if not path.stat().st_size:
            raise UserError(f"{named}, which is an empty file.")
        return _loaded(named, FILE_FORMATS[path.suffix], data_files=name, streaming=streaming)
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        if streaming:
            raise UserError("--dataset_streaming doesn't apply to a folder written by save_to_disk: it isn't copied.")
        return load_from_disk(name)
    if not path.is_dir() and (path.suffix in FILE_FORMATS or is_path(name)):
        raise UserError(f"{named}, but there is no such file or folder in '{Path.cwd()}'.")
    return _loaded(named, name, name=script_args.dataset_config, streaming=streaming)


def _of_the_gym(name: str, told: str | None, named: str) -> DatasetDict:
    """Reasoning Gym's tasks, after `GYM` and between commas, with the settings of `dataset_config`."""
    try:
        # A mapping, or `name=value` between commas, of which YAML makes one
        pairs = re.sub(r"(^|,)\s*([\w.]+)\s*=", r"\1 \2: ", told or "")
        settings = yaml.safe_load(told if told and told.startswith("{") else f"{{{pairs}}}")
    except (yaml.YAMLError, ValueError):
        settings = {None: None}
    if None in settings.values() or not all(isinstance(key, str) for key in settings):
        raise UserError(f"--dataset_config is '{told}'. Write settings of {name} as max_terms=3,size=500.")
    tasks = [task.strip() for task in name.removeprefix(GYM).split(",")]
    try:
        return reasoning_gym.build_dataset(tasks, settings)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"{named}: {error}") from error


def _loaded(named: str, *args: Any, **kwargs: Any) -> Any:
    """What `load_dataset` returns; whatever it raises is about the data set that is named."""
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(f"{named}, which can't be loaded: {type(reason).__name__}: {reason}.") from error


def is_path(name: str) -> bool:
    """Whether a name can only be a path: no id on the Hub begins like one, or has a second slash."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith("/")


def get_split(data: Mapping[str, Any], split: str, argument: str) -> Any:
    """One split of the data. Raises `UserError` naming the argument and the splits there are."""
    if split not in data:
        raise UserError(f"--{argument} is '{split}', but the data set has only: {', '.join(data)}.")
    return data[split]


def check_model(name: str | None, argument: str, revision: str = "main") -> None:
    """
    Whether there is a model, before anything is loaded.

    Args:
        name (`str`, *optional*):
            Hub id or folder of a model or an adapter. `None`: none is asked for.
        argument (`str`):
            The argument that names it.
        revision (`str`, *optional*, defaults to `"main"`):
            Its version on the Hub.

    Raises:
        UserError: if there is none.
    """
    if name is None:
        return
    named, path = f"--{argument} is '{name}'", Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in MODEL_FILES):
            raise UserError(f"{named}, a folder without {' or '.join(MODEL_FILES)}: there is no model in it.")
    elif path.exists() or is_path(name):
        raise UserError(f"{named}, but there is no such folder in '{Path.cwd()}'.")
    else:
        try:
            PretrainedConfig.get_config_dict(name, revision=revision)
        except OSError as error:
            if find_adapter_config_file(name, revision=revision) is not None:
                return
            reason = str(error).split("\n")[0]
            raise UserError(f"{named}, no folder in '{Path.cwd()}', and on the Hub: {reason}") from error


def check_models(script_args: Any, model_args: ModelConfig) -> None:
    """[`check_model`] for every model that the arguments of a recipe name. Raises `UserError`."""
    check_model(model_args.model_name_or_path, "model_name_or_path", model_args.model_revision)
    for argument in ("reward_model_name_or_path", "value_model_name_or_path"):
        check_model(getattr(script_args, argument, None), argument)
    for name in getattr(script_args, "reward_funcs", None) or []:
        if "/" in name and ".py" not in name:
            check_model(name, "reward_funcs")


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
        ptx = DataArguments(dataset_name=script_args.ptx_dataset_name)
        data = _splits(_read(ptx, "ptx_dataset_name"), ptx)
        text = get_split(data, script_args.ptx_dataset_split, "ptx_dataset_split")
    funcs = [func for func in reward_funcs if func != reward_model]
    shared = next((func for func in funcs if isinstance(func, AdapterReward) and func.folder == reward_model), None)
    return {
        # The reward model is last, also where it is an adapter of the policy
        "reward_funcs": funcs if shared is None else [*(func for func in funcs if func is not shared), shared],
        "reward_model": reward_model if shared is None else None,
        "value_model": script_args.value_model_name_or_path,
        "ptx_dataset": text,
    }
