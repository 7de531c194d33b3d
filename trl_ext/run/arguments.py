"""
The arguments of recipes, beside those of TRL's configurations, and how they are read from a command line and a yaml
file.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..errors import UserError
from ..monitors.bands import Bands
from ..pipelines.dpo_then_ppo import DPOThenPPO
from ..planner.layouts import find_layout
from .hub import be_patient
from .machine import give_back_deepspeed
from .parsing import CONFIG, RecipeParser, config_file, read_config, words_of
from .program import Parser, preparing


# TRL's defaults are made for GPUs.
WITHOUT_ACCELERATOR = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
# A repository that a recipe creates is the user's own until they publish it.
ON_THE_HUB = {"hub_private_repo": True}
METHODS = ("PPO", "GRPO", "DAPO", "DUPO", "GSPO")  # that a schedule can end with
_SCHEDULE: Mapping[str, Any] = DPOThenPPO.__init__.__kwdefaults__ or {}


@dataclass
class DataArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] plus what local runs need. `dataset_name` may also be a folder written by `save_to_disk`,
    a json, jsonl, csv or parquet file, or `reasoning_gym:` and names of tasks between commas
    ([`trl_ext.rewards.reasoning_gym`]), whose settings `dataset_config` has: `max_terms=3,size=500`.

    Args:
        prepare_row (`str`, *optional*):
            Function applied to every row, e.g. to build `prompt` from other columns: `package.module.function` or
            `path/to/file.py:function`. It takes a row and returns the columns to add or replace.
        cpu_threads (`int`, *optional*):
            Threads PyTorch computes with when there is no accelerator. Tiny models are fastest with 1.
        push_timeout (`float`, *optional*, defaults to `120.0`):
            With `push_to_hub`: seconds after which a request to the Hub that gets no answer has failed.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check arguments, data, rewards and memory, print what was found, and train nothing.
        layout (`str`, *optional*):
            GPUs to plan memory for, such as `4xa100-80g`: one of [`~trl_ext.planner.layouts.LAYOUTS`]. Default: those
            of the machine.
        force (`bool`, *optional*, defaults to `False`):
            Start a run that doesn't fit by its plan.
        expect (`dict` or `str`, *optional*):
            Numbers that the run should show at which steps; it says when it leaves them
            ([`~trl_ext.monitors.bands.Bands`]): a mapping in a yaml file, JSON on the command line. Of `dpo_then_ppo`
            with the stage before the name: `dpo/loss`, `ppo/reward`.

    `config_file` is the yaml file that the arguments were read from, `None` if there was none. The files that it names
    may lie beside it. `on_gpus` is the trainer's configuration as it would be on the GPUs of `layout`, `None` without.
    `chosen` has the names of the arguments that the yaml file or the command line named.
    """

    prepare_row: str | None = field(
        default=None, metadata={"help": "Function applied to every row: module.function or file.py:function."}
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads PyTorch computes with when there is no accelerator."}
    )
    push_timeout: float = field(
        default=120.0, metadata={"help": "Seconds after which a request to the Hub without an answer has failed."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print it, and train nothing."})
    layout: str | None = field(default=None, metadata={"help": "GPUs to plan memory for, such as 4xa100-80g."})
    force: bool = field(default=False, metadata={"help": "Start a run that doesn't fit by its plan."})
    expect: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Numbers to expect, by name and step: {"reward": {"20": [0.2, 0.5]}}.'}
    )
    config_file: Path | None = field(default=None, init=False)  # no argument
    on_gpus: Any = field(default=None, init=False)  # no argument
    chosen: list[str] = field(default_factory=list, init=False)  # no argument


@dataclass
class PolicyArguments(DataArguments):
    """
    Arguments of the recipes that sample completions and score them.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `package.module.function`, `path/to/file.py:function`, the name of one of TRL's
            (`accuracy_reward`, `think_format_reward`, ...), `reasoning_gym_reward` (the verifiers of
            `--dataset_name reasoning_gym:...`), or the Hub id or folder of a reward model.
        reward_model_name_or_path (`str`, *optional*):
            One more reward model, as in TRL's own scripts.
        share_reward_base (`bool`, *optional*):
            Whether a reward model that is the folder of an adapter is loaded into the policy's own model
            ([`~trl_ext.AdapterReward`]) or, `False`, as a model of its own. Default: if the policy is trained with an
            adapter, too (`use_peft`).
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
    share_reward_base: bool | None = field(
        default=None, metadata={"help": "Load a reward model that is an adapter into the policy's own model."}
    )
    held_out_prompts: int = field(
        default=256, metadata={"help": "Prompts of the test split to measure on before and after. 0: none."}
    )
    held_out_samples: int = field(default=4, metadata={"help": "Completions sampled for each held-out prompt."})
    held_out_every: int = field(default=0, metadata={"help": "Also measure every so many optimizer steps."})
    held_out_seed: int = field(default=0, metadata={"help": "Chooses the held-out prompts and the samples."})
    curriculum: str | None = field(default=None, metadata={"help": "'easy_to_hard', 'frontier' or 'mixed'."})
    curriculum_column: str | None = field(default=None, metadata={"help": "Column that says how hard a row is."})
    health_checks: bool = field(default=False, metadata={"help": "Warn when a measurement leaves its usual range."})
    verify: bool = field(
        default=False, metadata={"help": "Measure first that the gradient is TRL's, and what is saved."}
    )


@dataclass
class PPOArguments(PolicyArguments):
    """
    Arguments of `recipes/ppo.py`.

    Args:
        value_model_name_or_path (`str`, *optional*):
            A sequence classification model with one output, from which the critic starts. Sets `critic="model"`.
        ptx_dataset_name (`str`, *optional*):
            Text for the language-modelling term of `--ptx_coef`: whatever `--dataset_name` can be.
        ptx_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
    """

    value_model_name_or_path: str | None = field(default=None, metadata={"help": "Model that the critic starts from."})
    ptx_dataset_name: str | None = field(default=None, metadata={"help": "Text for the language-modelling term."})
    ptx_dataset_split: str = field(default="train", metadata={"help": "Split of that text."})


@dataclass
class DPOArguments(PolicyArguments):
    """
    Arguments of `recipes/dpo.py`.

    Args:
        held_out_split (`str`, *optional*):
            Split of prompts for which completions are sampled and scored, before and after training. `None`: none are.
        held_out_length (`int`, *optional*, defaults to `256`):
            Maximum length of those completions, in tokens.
    """

    held_out_split: str | None = field(default=None, metadata={"help": "Split of prompts to sample and score."})
    held_out_length: int = field(default=256, metadata={"help": "Maximum length of those completions, in tokens."})


@dataclass
class HybridArguments(PPOArguments):
    """
    Arguments of `recipes/dpo_then_ppo.py`; see [`~trl_ext.DPOThenPPO`].

    Args:
        method (`str`, *optional*, defaults to `"PPO"`):
            Method of the second stage.
        dpo (`dict` or `str`, *optional*):
            Arguments of [`~trl_ext.DPOConfig`], and `curriculum` and `curriculum_column`: a mapping in a yaml file,
            JSON on the command line.
        pairs (`dict` or `str`, *optional*):
            Arguments of [`~trl_ext.make_pairs`] and the number of `prompts`; or the `split` of given pairs. The
            `eval_split` holds pairs to measure on.
        clean, reference, rounds, accuracy_threshold, accuracy_logs, dpo_held_out_every, dpo_patience, fit_critic
        (*optional*):
            As in [`~trl_ext.DPOThenPPO`].
        start_name (`str`, *optional*, defaults to `"start"`):
            What reports call the model before any stage.
    """

    method: str = field(default=METHODS[0], metadata={"help": f"Method of the second stage: {', '.join(METHODS)}."})
    dpo: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of DPOConfig, and `curriculum`."}
    )
    pairs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Arguments of make_pairs, or a split."})
    clean: str | None = field(default=None, metadata={"help": "'cross_fitting', or 'none'."})
    reference: str = field(
        default=_SCHEDULE["reference"], metadata={"help": "Reference of the second stage: 'base' or 'dpo'."}
    )
    rounds: int = field(default=_SCHEDULE["rounds"], metadata={"help": "How often all stages are repeated."})
    accuracy_threshold: float | None = field(
        default=_SCHEDULE["accuracy_threshold"],
        metadata={"help": "Preference accuracy that ends DPO. None: DPO runs to its last step."},
    )
    accuracy_logs: int = field(
        default=_SCHEDULE["accuracy_logs"], metadata={"help": "Consecutive logs above the threshold."}
    )
    dpo_held_out_every: int = field(
        default=_SCHEDULE["dpo_held_out_every"],
        metadata={"help": "Steps between measurements of DPO's policy, whose held-out reward then ends DPO. 0: none."},
    )
    dpo_patience: int = field(
        default=_SCHEDULE["dpo_patience"],
        metadata={"help": "Measurements in a row that may be no better than the best one."},
    )
    fit_critic: int = field(
        default=_SCHEDULE["fit_critic"],
        metadata={"help": "Passes over the completions of the pairs that fit the critic before PPO."},
    )
    start_name: str = field(default="start", metadata={"help": "What reports call the model before any stage."})


@dataclass
class FilterArguments(PolicyArguments):
    """
    Arguments of `recipes/filter_prompts.py`.

    Args:
        drop_unsolved (`bool`, *optional*, defaults to `False`):
            Drop also the prompts that no sample solves.
    """

    drop_unsolved: bool = field(default=False, metadata={"help": "Drop also the prompts that no sample solves."})


@dataclass
class PairArguments(PolicyArguments):
    """
    Arguments of `recipes/make_pairs.py`.

    Args:
        strategy, margin, max_pairs, truncated (*optional*):
            As in [`~trl_ext.make_pairs`].
        max_prompts (`int`, *optional*):
            Prompts to sample for, chosen by `seed`. `None`: all.
    """

    strategy: str = field(default="best_worst", metadata={"help": "'best_worst', 'margin' or 'majority'."})
    margin: float = field(default=0.0, metadata={"help": "By how much scores have to differ, at least."})
    max_pairs: int | None = field(default=None, metadata={"help": "Pairs of a prompt, the largest margins first."})
    truncated: str = field(default="drop", metadata={"help": "Completions without an end: 'drop', 'reject', 'keep'."})
    max_prompts: int | None = field(default=None, metadata={"help": "Prompts to sample for. None: all."})


class ParsedArguments(NamedTuple):
    """What [`parse_arguments`] returns."""

    script: Any
    training: Any
    model: ModelConfig
    mixture: DatasetMixtureConfig


def parse_arguments(
    script_class: type, config_class: type, argv: list[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> ParsedArguments:
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
            Defaults of the recipe, where they are not those of the classes.

    Returns:
        [`ParsedArguments`]: script arguments, training arguments, [`~trl.ModelConfig`] and
        [`~trl.DatasetMixtureConfig`].

    Raises:
        UserError: if no model is named, an argument doesn't exist, or a configuration refuses its values.
    """
    classes: Any = (script_class, config_class, ModelConfig, DatasetMixtureConfig)
    parser = RecipeParser(classes)
    has_accelerator = torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if not has_accelerator:
        parser.set_defaults(**WITHOUT_ACCELERATOR)
    parser.set_defaults(**ON_THE_HUB, **(defaults or {}))
    argv = sys.argv[1:] if argv is None else argv
    file, words = config_file(argv), words_of(argv)
    named = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--") and word != CONFIG]
    if file is not None:
        named += read_config(file)
        words[words.index(CONFIG) + 1] = str(file)
    with preparing():
        parsed = ParsedArguments(*parser.parse_args_and_config(words))
    script_args, training_args = parsed.script, parsed.training
    model_args: Any = parsed.model
    script_args.config_file, script_args.chosen = file, named
    if script_args.layout is not None:
        with preparing():
            find_layout(script_args.layout)
            script_args.on_gpus = training_args if has_accelerator else _on_gpus(classes, words, defaults)
            give_back_deepspeed(training_args)
    script_args.expect = as_mapping(script_args.expect, "expect")
    try:
        Bands(script_args.expect)
    except (TypeError, ValueError) as error:
        raise UserError(f"--{error}") from error
    model_args.lora_target_modules = _module_names(model_args.lora_target_modules)
    if model_args.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing. Give the Hub id or the folder of the model to train.")
    if training_args.hub_token is not None:
        # The trainer saves its arguments beside the model and pushes them: the token must not be among them
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if training_args.push_to_hub:
        be_patient(script_args.push_timeout)
    if not has_accelerator:
        if script_args.cpu_threads is not None:
            torch.set_num_threads(script_args.cpu_threads)
        settings = ", ".join(f"{name}={getattr(training_args, name)}" for name in WITHOUT_ACCELERATOR)
        if training_args.process_index == 0:
            print(f"No accelerator in use: {settings}, {torch.get_num_threads()} thread(s) per process.", flush=True)
    return parsed


def _on_gpus(classes: Any, words: list[str], defaults: Mapping[str, Any] | None) -> Any:
    """The trainer's configuration with the defaults that it has on GPUs."""
    parser = RecipeParser(classes)
    parser.set_defaults(use_cpu=True, **(defaults or {}))
    return ParsedArguments(*parser.parse_args_and_config(words)).training


def _module_names(modules: str | list[str] | None) -> str | list[str] | None:
    """
    The modules that get an adapter. TRL makes a text of a list of one, which PEFT takes for a pattern that whole names
    of modules must match; a single name is meant as a name.
    """
    is_name = isinstance(modules, str) and modules != "all-linear" and re.fullmatch(r"[\w.]+", modules)
    return [str(modules)] if is_name else modules


def peek(argv: list[str], name: str, choices: tuple[str, ...]) -> str:
    """
    Reads an argument that decides which other arguments there are.

    Args:
        argv (`list[str]`):
            Arguments without the program's name.
        name (`str`):
            Name of the argument, on the command line or in the yaml file.
        choices (`tuple[str, ...]`):
            Allowed values; the first is the default.

    Raises:
        UserError: if it is none of the choices.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    found = vars(parser.parse_known_args(argv)[0])[name]
    if found is None:
        found = read_config(config_file(argv)).get(name)
    found = choices[0] if found is None else found
    if found not in choices:
        raise UserError(f"--{name} is '{found}'. Choose one of {', '.join(choices)}.")
    return str(found)


def as_mapping(value: dict[str, Any] | str | None, argument: str) -> dict[str, Any]:
    """
    Arguments within an argument, as a new dictionary: a mapping in the yaml file, JSON on the command line.

    Raises:
        UserError: if it is neither.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else dict(value or {})
    except ValueError as error:
        raise UserError(f"--{argument} is '{value}', which is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"--{argument} is '{value}'. Write a mapping, such as '{{\"name\": 1}}'.")
    return found
