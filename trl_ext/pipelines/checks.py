"""
What [`~trl_ext.pipelines.dpo_then_ppo.DPOThenPPO`] refuses before a model is loaded. Each check raises `ValueError`
with a message that says what to change.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import meant, require, require_count, require_number, require_one_of, require_type
from ..preferences.noise import FEWEST_PAIRS
from ..preferences.pairs import check_settings, make_pairs
from ..rewards.implicit import IMPLICIT_REWARD
from ..roles.trunk import ADAPTER
from ..trainers.data_checks import check_prompts
from ..trainers.pair_checks import check_pairs
from ..trainers.reward_checks import check_kind, check_signature, is_function
from ..trainers.samples import sample_of
from ..trainers.tokenizer_checks import check_tokenizer


if TYPE_CHECKING:
    from .dpo_then_ppo import DPOThenPPO

# Values of arguments
CROSS_FITTING = "cross_fitting"
BASE, DPO_POLICY = "base", "dpo"
REFERENCES = (BASE, DPO_POLICY)
# Arguments of `make_pairs` that the schedule sets itself
OWN_PAIR_SETTINGS = {"trainer", "dataset", "partial_results", "on_progress"}


# Arguments of trainers that the schedule sets itself
OWN_TRAINER_SETTINGS = {"self", "args", "kwargs", "model", "reward_funcs", "train_dataset", "processing_class"}
OWN_TRAINER_SETTINGS |= {"peft_config"}


def adopted_as(name: str, config_class: Any, args: Any) -> Any:
    """The configuration of a stage, adopted by its class. An error names the argument of the schedule."""
    try:
        return config_class.adopt(args)
    except TypeError as error:
        raise TypeError(str(error).replace("`args`", f"`{name}`")) from None


def check_types(
    output_dir: Any,
    peft_config: Any,
    model_init_kwargs: Any,
    pair_settings: Any,
    dpo_kwargs: Any,
    policy_kwargs: Any,
    clean: Any,
    prepare: Any,
) -> None:
    """Raises `TypeError` for arguments of a wrong type."""
    require_type("output_dir", output_dir, str | Path, "Pass a folder.")
    require_type("peft_config", peft_config, PeftConfig | None, "Pass a configuration such as peft.LoraConfig(r=16).")
    for name, value in (
        ("model_init_kwargs", model_init_kwargs),
        ("pair_settings", pair_settings),
        ("dpo_kwargs", dpo_kwargs),
        ("policy_kwargs", policy_kwargs),
    ):
        require_type(name, value, Mapping | None, "Pass a dict of arguments, or None.")
    require_type("clean", clean, str | Callable | None, "Pass a function, or None.")
    require_type("prepare", prepare, Callable | None, "Pass a function, or None.")


def check_arguments(run: "DPOThenPPO") -> None:
    """Raises an error for arguments that can't work, alone or together."""
    _check_policy(run)
    _check_schedule(run)
    _check_configurations(run)
    _check_trainers(run)
    _check_parallelism(run)
    _check_fitting(run)
    _check_rewards(run)
    _check_data(run)
    _check_pairs(run)


def _check_policy(run: "DPOThenPPO") -> None:
    has_adapter = isinstance(run.model, PeftModel)
    require(
        has_adapter != (run.peft_config is not None),
        "`peft_config` was passed with a model that already has an adapter. Pass one of them."
        if has_adapter
        else "`peft_config` is missing: what DPO hands to the next stage is an adapter. Pass a LoraConfig.",
    )
    require(
        not has_adapter or any(weight.requires_grad for weight in run.model.parameters()),
        "No weight of the model's adapter is trainable. Load it with PeftModel.from_pretrained(..., "
        "is_trainable=True).",
    )
    require(
        not has_adapter or list(run.model.peft_config) == [ADAPTER],
        f"The model has the adapters {list(getattr(run.model, 'peft_config', {}))}. Pass a model with only one, "
        f"{ADAPTER!r}.",
    )
    require_one_of("reference", run.reference, REFERENCES)
    require(
        run.reference == DPO_POLICY or not run.policy_args.sync_ref_model,
        f"sync_ref_model refreshes a copy of the adapter, and with reference={BASE!r} there is none. Set "
        f"reference={DPO_POLICY!r}.",
    )


def _check_schedule(run: "DPOThenPPO") -> None:
    require(
        not isinstance(run.clean, str) or run.clean == CROSS_FITTING,
        f"clean={run.clean!r} is unknown. Choose {CROSS_FITTING!r}, or pass a function.",
    )
    require_count("rounds", run.rounds)
    require_count("accuracy_logs", run.accuracy_logs)
    require_count("held_out_samples", run.held_out_samples)
    require_count("held_out_every", run.held_out_every, least=0)
    require_count("dpo_held_out_every", run.dpo_held_out_every, least=0)
    require_count("dpo_patience", run.dpo_patience)
    if run.dpo_held_out_every:
        _check_measured_dpo(run)
    if run.accuracy_threshold is not None:
        require_number("accuracy_threshold", run.accuracy_threshold)
    require(not run.output_dir.is_file(), f"output_dir={str(run.output_dir)!r} is a file. Name a folder.")
    require(
        run.accuracy_threshold is None or 0 < run.accuracy_threshold < 1,
        f"accuracy_threshold={run.accuracy_threshold} is a share of pairs and must be in (0, 1), or None.",
    )
    require(
        run.accuracy_threshold is None or run.dpo_args.logging_strategy != "no",
        "accuracy_threshold is compared with logs, and logging_strategy of dpo_args is 'no'. Set it to 'steps', "
        "or accuracy_threshold to None.",
    )


def _check_configurations(run: "DPOThenPPO") -> None:
    evaluates = run.dpo_args.eval_strategy != "no"
    require(
        not evaluates or run.eval_pairs is not None,
        "eval_strategy of dpo_args needs eval_pairs. Pass them, or set it to 'no'.",
    )
    require(
        evaluates or run.eval_pairs is None,
        "eval_pairs were passed, but dpo_args never evaluates. Set its eval_strategy, or leave eval_pairs out.",
    )
    for name, args in (("dpo_args", run.dpo_args), ("policy_args", run.policy_args)):
        require(
            not args.save_only_model,
            f"save_only_model of {name}: a stage can't be resumed from such a checkpoint. Set it to False.",
        )
        require(
            not args.load_best_model_at_end,
            f"load_best_model_at_end of {name}: a stage hands on the policy of its last step. Set it to False.",
        )
    require(
        run.policy_args.eval_strategy == "no" or run.policy_kwargs.get("eval_dataset") is not None,
        "eval_strategy of policy_args needs an eval_dataset in policy_kwargs. Pass it, or set it to 'no'.",
    )


def _check_trainers(run: "DPOThenPPO") -> None:
    """Whether `dpo_kwargs` and `policy_kwargs` name arguments of the trainers that the schedule doesn't set."""
    check_tokenizer("processing_class", run.processing_class)
    own = inspect.signature(run.policy_trainer.__init__).parameters
    known_of = {
        "dpo_kwargs": {*inspect.signature(trl.DPOTrainer.__init__).parameters, "curriculum"},
        "policy_kwargs": {*inspect.signature(trl.GRPOTrainer.__init__).parameters, "curriculum", *own},
    }
    for name, given in (("dpo_kwargs", run.dpo_kwargs), ("policy_kwargs", run.policy_kwargs)):
        known = sorted(known_of[name] - OWN_TRAINER_SETTINGS)
        for argument in given:
            require(
                argument in known,
                f"{name} has {argument!r}, which the trainer doesn't take or the schedule sets. Choose from "
                f"{', '.join(known)}.{meant(argument, known)}",
            )


def _check_parallelism(run: "DPOThenPPO") -> None:
    require(
        not (run.policy_args.fsdp or run.dpo_args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")),
        "FSDP wraps a model permanently, so that no second trainer can use it. Use DeepSpeed or DDP, or run the "
        "recipes one after the other.",
    )
    scores_with_adapters = IMPLICIT_REWARD in run.reward_funcs or run.clean == CROSS_FITTING
    require(
        not (scores_with_adapters and is_deepspeed_zero3_enabled()),
        f"{IMPLICIT_REWARD!r} and clean={CROSS_FITTING!r} score with whole adapters, which ZeRO-3 shards over "
        "processes. Use ZeRO-2, or leave them out.",
    )


def _check_fitting(run: "DPOThenPPO") -> None:
    require_count("fit_critic", run.fit_critic, least=0)
    if run.fit_critic == 0:
        return
    require(
        run.policy_trainer.has_value_loss,
        f"fit_critic={run.fit_critic}, and {run.policy_trainer.__name__} has no critic. Leave it out.",
    )
    require(
        run.pairs is None or run.rounds > 1,
        f"fit_critic={run.fit_critic} fits the critic to the completions that pairs are made of, and pairs were "
        "given. Leave one of them out.",
    )
    require(
        not _sharded(run),
        f"fit_critic={run.fit_critic} comes before the second stage's engine, and DeepSpeed's shards the weights. Use "
        "DDP, or leave it out.",
    )


def _sharded(run: "DPOThenPPO") -> bool:
    return bool(run.policy_args.deepspeed) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def _check_measured_dpo(run: "DPOThenPPO") -> None:
    setting = f"dpo_held_out_every={run.dpo_held_out_every}"
    require(
        run.held_out is not None,
        f"{setting} measures DPO's policy on held-out prompts, and there are none. Pass held_out, or leave it out.",
    )
    require(
        not run.policy_args.use_vllm,
        f"{setting} samples while DPO trains, and vLLM is given new weights by the second stage's steps only. Set "
        "use_vllm=False, or leave it out.",
    )
    require(
        not _sharded(run),
        f"{setting} samples from weights that DPO trains, which DeepSpeed shards. Use DDP, or leave it out.",
    )


def _check_rewards(run: "DPOThenPPO") -> None:
    require(run.has_judges or bool(run.reward_funcs), "reward_funcs is empty. Pass a function, or a reward model.")
    for func in run.reward_funcs:
        if func != IMPLICIT_REWARD:
            check_kind(func)
    samples_pairs = run.pairs is None or run.rounds > 1
    require(
        run.has_judges or not (samples_pairs or run.held_out is not None),
        f"{IMPLICIT_REWARD!r} is what DPO learns from pairs: it can't judge those it learns from, nor the policy at "
        "the start. Pass pairs (with rounds=1 and without held_out), or a different reward.",
    )
    weights = run.policy_args.reward_weights
    count = len(run.reward_funcs) + (run.reward_model is not None)
    require(
        weights is None or len(weights) == count,
        f"reward_weights of policy_args has {len(weights or [])} numbers for {count} rewards. Give one for each.",
    )


def _check_data(run: "DPOThenPPO") -> None:
    require(run.train_dataset is not None, "train_dataset=None: pass a data set with a `prompt` column.")
    pair_columns = {"chosen", "rejected"} | ({"prompt"} if run.clean == CROSS_FITTING else set())
    for name, dataset, columns in (
        ("train_dataset", run.train_dataset, {"prompt"}),
        ("pairs", run.pairs, pair_columns),
        ("eval_pairs", run.eval_pairs, {"chosen", "rejected"}),
        ("held_out", run.held_out, {"prompt"}),
    ):
        require(
            dataset is None or isinstance(dataset, Dataset),
            f"{name} is a {type(dataset).__name__}, which may not give the same rows again when the run is continued. "
            "Load it as a datasets.Dataset.",
        )
        missing = columns - set(dataset.column_names) if dataset is not None else set()
        require(not missing, f"{name} lacks the columns {sorted(missing)}. Add them, or rename the columns it has.")
        require(dataset is None or len(dataset) > 0, f"{name} has no rows. Pass some.")
        if dataset is None:
            continue
        if "chosen" in columns:
            check_pairs(name, dataset, run.processing_class)
            continue
        check_prompts(name, sample_of(name, dataset, ["prompt"]).rows)
        for func in run.reward_funcs:
            if is_function(func) and run.policy_kwargs.get("rollout_func") is None:
                check_signature(func, run.policy_args, dataset.column_names, name)
    require(
        run.held_out is None or len(run.held_out) >= 2,
        "held_out has 1 row, and an interval needs at least 2. Pass more.",
    )


def _check_pairs(run: "DPOThenPPO") -> None:
    few = run.clean == CROSS_FITTING and run.pairs is not None and len(run.pairs) < FEWEST_PAIRS
    require(
        not few,
        f"clean={CROSS_FITTING!r} can estimate the share of wrong labels from {FEWEST_PAIRS} pairs on. Pass more "
        "pairs, or leave clean out.",
    )
    known = {"prompts", *inspect.signature(make_pairs).parameters} - OWN_PAIR_SETTINGS
    unknown = sorted(run.pair_settings.keys() - known)
    require(not unknown, f"pair_settings has {unknown}. Choose from {', '.join(sorted(known))}.")
    if run.pairs is not None and run.rounds == 1:
        return
    defaults = {name: parameter.default for name, parameter in inspect.signature(make_pairs).parameters.items()}
    chosen = {**defaults, **run.pair_settings}
    check_settings(
        run.policy_args.num_generations if chosen["num_generations"] is None else chosen["num_generations"],
        *(chosen[name] for name in ("strategy", "margin", "max_pairs", "truncated", "batch_size")),
    )
