"""
`--dry_run`: everything that can be checked of a run before its models are loaded, printed, and nothing trained. And
what every recipe does at this point: the check of memory, or the dry run in place of the training.
"""

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import get_last_checkpoint, has_length

from ..planner.shapes import find_shape
from ..planner.speed import forecast, in_words
from ..planner.text import describe, table, verdict
from ..trainers.data_checks import check_inputs
from ..trainers.dpo import DPOTrainer
from ..trainers.grpo import GRPOTrainer
from ..trainers.pair_checks import check_all_pairs, check_weights
from ..trainers.ppo_inputs import add_reward_model
from .arguments import ParsedArguments
from .fitting import Stage, check_fit, load_tokenizer, plan_stage, planned_layout
from .lengths import PROMPT, Lengths, measure_lengths, some_rows
from .machine import NotPlanned, speeds_are_known
from .program import STATUS
from .publishing import leave
from .trying import try_reward


ROWS_MEASURED = 20_000  # whose lengths a dry run looks at
ROWS_TRIED = 4  # on which rewards are tried
FITS, DOES_NOT_FIT = 0, 1


def before_loading(stages: Sequence[Stage], arguments: ParsedArguments, data: Mapping[str, Any]) -> None:
    """
    What a recipe does before it loads a model: it checks that the run fits, or, with `--dry_run`, everything that can
    be checked, and ends the process.

    Args:
        stages (`Sequence[Stage]`):
            The trainers that it is about to make, one after the other.
        arguments ([`ParsedArguments`]):
            Of the run.
        data (`Mapping[str, Any]`):
            Data sets by split.

    Raises:
        UserError: if it doesn't fit.
        SystemExit: at the end of a dry run: status 0, 1 if it doesn't fit, 2 if something is wrong.
    """
    if not arguments.script.dry_run:
        return check_fit(stages, arguments)
    state: Any = PartialState()
    layout = planned_layout(arguments.script)
    status = [FITS]
    if state.is_main_process:
        status = [DryRun(stages, arguments, data, layout).report()]
    broadcast_object_list(status)
    leave()
    sys.exit(status[0])


class DryRun:
    """
    The checks of a run, in the first process.

    Args:
        stages, arguments, data:
            As for [`before_loading`].
        layout ([`~trl_ext.planner.layouts.Layout`], *optional*):
            The GPUs to plan for.
    """

    def __init__(
        self, stages: Sequence[Stage], arguments: ParsedArguments, data: Mapping[str, Any], layout: Any
    ) -> None:
        self.stages, self.arguments, self.data, self.layout = stages, arguments, data, layout
        self.faults: list[str] = []
        self.fits = True
        self.tokenizer = load_tokenizer(arguments)

    def report(self) -> int:
        """Prints what was found. Returns the exit status."""
        file = self.arguments.script.config_file
        print(f"Dry run: nothing is trained, and nothing is written. Arguments: {file or 'the command line'}.")
        lines = [*self._splits(), *self._output_folder()]
        for stage in self.stages:
            lines += ["", f"{stage.trainer_class.__name__.removesuffix('Trainer')}:", *self._inputs(stage)]
            lengths = self._lengths(stage)
            lines += [*self._told(stage, lengths), *self._rewards(stage), *self._plan(stage, lengths)]
        print("\n".join(lines))
        for fault in self.faults:
            print(f"Wrong: {fault.rstrip('.')}.")
        if self.faults:
            print("Can't be trained as it is.", flush=True)
            return STATUS
        print("All is well." if self.fits else "All is well but for its size.", flush=True)
        return FITS if self.fits else DOES_NOT_FIT

    def _fault(self, error: Exception | str) -> None:
        self.faults.append(" ".join(str(error).split()))

    def _splits(self) -> list[str]:
        sizes = [
            f"{split} {f'{len(rows):,} rows' if has_length(rows) else 'a stream'}" for split, rows in self.data.items()
        ]
        names = next(iter(self.data.values())).column_names
        return [f"Data: {', '.join(sizes)}; columns: {', '.join(names) if names else 'unknown'}."]

    def _output_folder(self) -> list[str]:
        """What is in the output folder, and what a run would do with it."""
        args = self.arguments.training
        folder, given = Path(args.output_dir), str(args.resume_from_checkpoint)
        resumes = None if given.lower() in ("none", "false") else given
        above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if not above.is_dir() or not os.access(above, os.W_OK):
            self._fault(f"output_dir is '{folder}', and nothing can be written to '{above}'")
        if resumes is not None and resumes.lower() == "true" and last is None:
            self._fault(f"resume_from_checkpoint is true, and there is no checkpoint in '{folder}'")
        elif resumes is not None and resumes.lower() != "true" and not Path(resumes).is_dir():
            self._fault(f"resume_from_checkpoint is '{resumes}', which is no folder")
        if not folder.is_dir() or not any(folder.iterdir()):
            state = "new"
        elif last is None:
            state = "there are files in it, and no checkpoint"
        else:
            state = f"the last checkpoint in it is {Path(last).name}, " + (
                "from which nothing is resumed: resume_from_checkpoint is not set" if resumes is None else "resumed"
            )
        return [f"Output folder: {folder}: {state}."]

    def _inputs(self, stage: Stage) -> list[str]:
        """The checks that trainers make of their arguments before they load a model."""
        given = {name: value for name, value in stage.settings.items() if name != "curriculum"}
        curriculum, config = stage.settings.get("curriculum"), given["args"]
        given["processing_class"] = self.tokenizer
        try:
            if issubclass(stage.trainer_class, GRPOTrainer):
                reward_model = given.pop("reward_model", None)
                if reward_model is not None:
                    add_reward_model(given, reward_model, on_ids=False)
                check_inputs(config, given, curriculum)
            elif issubclass(stage.trainer_class, DPOTrainer) and not stage.sampled:
                check_all_pairs(given)
                check_weights(config, curriculum, given["train_dataset"])
        except (ValueError, TypeError, ImportError) as error:
            self._fault(error)
        return []

    def _lengths(self, stage: Stage) -> Lengths | None:
        rows = stage.settings["train_dataset"]
        try:
            return measure_lengths(rows, self.tokenizer, ROWS_MEASURED)
        except Exception as error:  # whatever the rows are, a trainer would stop at them
            self._fault(f"the rows to train on can't be tokenized: {type(error).__name__}: {error}")
            return None

    def _told(self, stage: Stage, lengths: Lengths | None) -> list[str]:
        """Lengths against the limits of the configuration and of the model."""
        if lengths is None:
            return []
        config = stage.settings["args"]
        of = "all" if lengths.whole else "of"
        if not any(lengths.totals):
            self._fault("the tokenizer makes no token of any row: it is not the one that the text was written for")
        parts = [f"{name} {_spread(tokens)}" for name, tokens in _named(lengths) if tokens]
        lines = [f"  Tokens ({of} {lengths.rows:,} rows): {'; '.join(parts)}."]
        limit, added = getattr(config, "max_length", None), getattr(config, "max_completion_length", None)
        if added is not None:
            lines += self._context(lengths.longest_prompt + added, f"{lengths.longest_prompt} + {added}")
            empty = sum(not count for count in lengths.prompts)
            lines += [f"  {empty:,} prompts are empty."] if empty else []
        elif limit is not None:
            longer = sum(total > limit for total in lengths.totals)
            dropped = sum(prompt >= limit for prompt in lengths.prompts)
            lines.append(
                f"  max_length={limit}: {longer:,} rows are cut, of which {dropped:,} are dropped, all prompt."
            )
        return lines

    def _context(self, tokens: int, told: str) -> list[str]:
        """Whether prompt and completion fit into the model's context."""
        try:
            config = find_shape(str(self.arguments.model.model_name_or_path)).config.get_text_config()
        except ValueError:  # no configuration is here
            return []
        longest = getattr(config, "max_position_embeddings", None)
        if longest is None:
            return []
        lines = [f"  Longest prompt and completion: {told} tokens; the model was made for {longest:,}."]
        return [*lines, "  That is more than it was made for."] if tokens > longest else lines

    def _rewards(self, stage: Stage) -> list[str]:
        funcs = stage.settings.get("reward_funcs")
        if funcs is None:
            return []
        rows, _ = some_rows(stage.settings["train_dataset"], ROWS_TRIED)
        if not rows or PROMPT not in rows[0]:
            return []
        removes = stage.settings["args"].remove_unused_columns
        rewards = [*(funcs if isinstance(funcs, list) else [funcs]), stage.settings.get("reward_model")]
        found = [try_reward(func, rows, self.tokenizer, bool(removes)) for func in rewards if func is not None]
        for one in found:
            if one.fault is not None:
                self._fault(one.fault)
        told = [f"    {one.told}" for one in found]
        return [f"  Rewards of {len(rows)} prompts, each with its own or a short text, and with no text:", *told]

    def _plan(self, stage: Stage, lengths: Lengths | None) -> list[str]:
        if self.layout is None:
            return ["  Memory: not planned, because there are no GPUs here. Name some with --layout."]
        if lengths is None:
            return ["  Memory: not planned."]
        try:
            outcome = plan_stage(stage, self.arguments, self.layout, lengths)
        except NotPlanned as reason:
            return [f"  Memory: not planned: {reason}."]
        plan = outcome.plan
        self.fits = self.fits and plan.fits
        times = in_words(forecast(plan.job)) if speeds_are_known(self.layout) else []
        told = [*describe(plan), "", *table(plan), "", *verdict(plan, None, outcome.change), *times]
        return [f"  {line}".rstrip() for line in told]


def _named(lengths: Lengths) -> list[tuple[str, list[int]]]:
    return [("prompts", lengths.prompts), ("what follows", lengths.answers)]


def _spread(tokens: Sequence[int]) -> str:
    return f"longest {max(tokens):,}, median {statistics.median(tokens):,.0f}"
