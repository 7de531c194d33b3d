"""
Whether a run fits on its GPUs, planned from its own arguments before its models are loaded. What the planner doesn't
know stops no run: it is said on one line.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from ..errors import UserError
from ..planner.job import Job
from ..planner.layouts import GIB, Layout, find_layout
from ..planner.models import check_layers_are_alike
from ..planner.plan import Plan, cheapest_change, make_plan
from ..planner.text import verdict
from .arguments import ParsedArguments
from .jobs import job_of_run, method_of
from .lengths import Lengths, measure_lengths
from .machine import NotPlanned, Spread, found_layout, found_spread, give_back_deepspeed


ROWS_FOR_LENGTHS = 512  # whose lengths a plan is made for
FORCE, DRY_RUN = "--force", "--dry_run"


class Stage(NamedTuple):
    """
    A trainer that a run is about to make.

    Args:
        trainer_class (`type`):
            Its class.
        settings (`Mapping[str, Any]`):
            Its arguments.
        on_gpus (`Any`, *optional*):
            Its configuration as it is on the GPUs to plan for, where that is not `settings["args"]`.
        sampled (`int`, *optional*, defaults to `0`):
            Tokens of the longest completion, where the rows to train on are yet to be sampled for the prompts.
        trains (`bool`, *optional*, defaults to `True`):
            Whether it trains, or samples only.
    """

    trainer_class: type
    settings: Mapping[str, Any]
    on_gpus: Any = None
    sampled: int = 0
    trains: bool = True


class Outcome(NamedTuple):
    """
    A plan of a run.

    Args:
        plan ([`~trl_ext.planner.plan.Plan`]):
            The plan.
        change (`list[str]`, *optional*):
            The cheapest change that makes it fit, if it doesn't.
    """

    plan: Plan
    change: list[str] | None

    @property
    def told(self) -> str:
        """Why it doesn't fit and what to do, in one paragraph."""
        job, layout = self.plan.job, self.plan.job.layout
        _, remedy = verdict(self.plan, None, self.change)
        where = f"{layout.name}, {layout.gpu_bytes / GIB:.1f} GiB a GPU, {job.strategy}"
        return (
            f"{job.method.upper()} of {job.model.name} does not fit ({where}): {self.plan.obstacle}. {remedy} "
            f"{FORCE} starts it all the same; {DRY_RUN} prints the plan."
        )


def planned_layout(script_args: Any) -> Layout | None:
    """The layout that `--layout` names, or that of the machine; `None` without both."""
    return found_layout() if script_args.layout is None else find_layout(script_args.layout)


def load_tokenizer(arguments: ParsedArguments) -> Any:
    """The tokenizer of the model that is about to be loaded."""
    model_args, trusted = arguments.model, getattr(arguments.training, "trust_remote_code", False)
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trusted
    )


def plan_stage(
    stage: Stage, arguments: ParsedArguments, layout: Layout, lengths: Lengths | None = None, *, search: bool = True
) -> Outcome:
    """
    Plan a run. It changes nothing of the process: no random number is drawn, and what DeepSpeed has set stays.

    Args:
        stage ([`Stage`]):
            The trainer.
        arguments ([`ParsedArguments`]):
            Of the run.
        layout ([`~trl_ext.planner.layouts.Layout`]):
            The GPUs.
        lengths ([`Lengths`], *optional*):
            Of the rows. Default: they are measured.
        search (`bool`, *optional*, defaults to `True`):
            Whether to look for a change if it doesn't fit.

    Raises:
        NotPlanned: with a reason, for whatever the planner can't do.
    """
    method_of(stage.trainer_class)
    if not stage.trains:
        raise NotPlanned("nothing is trained")
    training_args = stage.settings["args"] if stage.on_gpus is None else stage.on_gpus
    with _by_itself(stage.settings["args"]):
        try:
            spread = _spread(arguments, layout)
            if lengths is None:
                data = stage.settings["train_dataset"]
                lengths = measure_lengths(data, load_tokenizer(arguments), ROWS_FOR_LENGTHS)
            if stage.sampled:
                lengths = replace(lengths, answers=[stage.sampled] * lengths.rows)
            job = job_of_run(
                stage.trainer_class, stage.settings, training_args, arguments.model, lengths, layout, spread
            )
            check_layers_are_alike(job.model)
            plan = _with_shared_prompts(make_plan(job), training_args)
            change = None if plan.fits or not search else cheapest_change(plan.job)
            return Outcome(plan, change)
        except NotPlanned:
            raise
        except Exception as error:  # a model, data or a way to train that the planner has never seen
            raise NotPlanned(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _spread(arguments: ParsedArguments, layout: Layout) -> Spread:
    """A layout that is named, and of which this machine isn't one, leaves the strategy open."""
    spread = found_spread(arguments.training)
    is_open = arguments.script.layout is not None and spread == Spread("none") and layout.gpus > 1
    return Spread() if is_open else spread


def _with_shared_prompts(plan: Plan, config: Any) -> Plan:
    """A plan in which the completions of a micro-batch share their prompt, if they may and it only fits that way."""
    job: Job = plan.job
    shares = getattr(config, "share_prefixes", False) and getattr(config, "fit_micro_batches", False)
    rows = job.per_device_train_batch_size
    if plan.fits or not shares or not 1 < rows <= job.num_generations:
        return plan
    shared = make_plan(job.but(share_prefixes=True))
    return shared if shared.fits else plan


@contextmanager
def _by_itself(training_args: Any) -> Iterator[None]:
    """
    Within this context models are built as in a process of their own: not spread by ZeRO-3, and without warnings.
    """
    unset_hf_deepspeed_config()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        give_back_deepspeed(training_args)


def check_fit(stages: Sequence[Stage], arguments: ParsedArguments) -> None:
    """
    Plans a run and stops one that doesn't fit. The first process plans and speaks, the others wait for its answer.

    Args:
        stages (`Sequence[Stage]`):
            The trainers that the run makes, one after the other.
        arguments ([`ParsedArguments`]):
            Of the run.

    Raises:
        UserError: if it doesn't fit and `--force` isn't given: the phase that decides, what dominates it, and the
            change that would make it fit.
    """
    stages = [stage for stage in stages if stage.trains]
    state: Any = PartialState()
    layout = planned_layout(arguments.script)
    if layout is None or not stages:
        return
    told: list[str | None] = [None]
    if state.is_main_process:
        print(f"Planning the memory of a run on {layout.name}, before a model is loaded.", flush=True)
        told = [_first_that_does_not_fit(stages, arguments, layout)]
    broadcast_object_list(told)
    if told[0] is None:
        return
    if not arguments.script.force:
        raise UserError(told[0])
    state.print(f"Warning: {told[0]} Started all the same: {FORCE}.", flush=True)


def _first_that_does_not_fit(stages: Sequence[Stage], arguments: ParsedArguments, layout: Layout) -> str | None:
    for stage in stages:
        try:
            outcome = plan_stage(stage, arguments, layout)
        except NotPlanned as reason:
            print(f"Not planned, so not checked: {reason}.", flush=True)
            continue
        if not outcome.plan.fits:
            return outcome.told
        print(" ".join(verdict(outcome.plan, None, None)), flush=True)
    return None
