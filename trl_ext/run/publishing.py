"""What a run leaves beside the model: `summary.json`, figures, a model card; and the upload to the Hub."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation.credit import TokenCredit
from ..evaluation.held_out import Estimate
from ..monitors.bands import bands_of, entries, lines
from ..reports.card import results_section
from ..reports.card_sections import details
from ..reports.plots import plot_learning, plot_reliability, plot_tokens
from ..reports.run_files import read_run, write_settings
from ..reports.summary import SUMMARY, intervals_in_words, summarize, write_summary
from ..trainers.cards import as_written, example_of
from .arguments import ParsedArguments
from .files import recipes_folder
from .hub import uploading
from .loading import GYM


PICTURES = ("learning.png", "tokens.png", "reliability.png")
# Fields of script arguments that a user can't set
NO_ARGUMENTS = ("chosen", "config_file", "on_gpus")
# What trainers leave out of an upload
NOT_PUSHED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")


def write_arguments(folder: str | Path, arguments: ParsedArguments) -> None:
    """Writes `settings.json`, before training, so that a run that is under way can be compared. Main process only."""
    script, training = vars(arguments.script), arguments.training.to_dict()
    parts = (asdict(arguments.mixture), asdict(arguments.model), training)
    settings = {name: value for part in parts for name, value in part.items()}
    own = {name: value for name, value in script.items() if name not in NO_ARGUMENTS}
    write_settings(folder, settings | own, arguments.script.chosen)


def write_results(
    trainer: Any,
    arguments: ParsedArguments,
    measured: dict[int, dict[str, Estimate]],
    seconds: float,
    argv: Sequence[str] | None = None,
    reward_model: str | None = None,
) -> dict[str, Any]:
    """
    Writes `summary.json`. Only the main process makes the call.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, after training.
        arguments ([`ParsedArguments`]):
            Arguments of the run.
        measured (`dict[int, dict[str, Estimate]]`):
            Held-out estimates by optimizer step and metric.
        seconds (`float`):
            Wall-clock seconds of the run.
        argv (`Sequence[str]`, *optional*):
            Arguments without the program's name. `None`: the summary has no command.
        reward_model (`str`, *optional*):
            Hub id or folder of the reward model.

    Returns:
        `dict[str, Any]`: the summary.
    """
    summary = summarize(
        trainer,
        measured,
        seconds=seconds,
        model=arguments.model.model_name_or_path,
        dataset=arguments.script.dataset_name,
        command=None if argv is None else command_line(sys.argv[0], argv, trainer.accelerator.num_processes),
        reward_model=reward_model,
    )
    if bands_of(trainer):
        summary["expected"] = entries(bands_of(trainer))
    write_summary(summary, Path(trainer.args.output_dir) / SUMMARY)
    after = summary["after"] or {}
    trainer.card.metrics |= {metric: after[metric] for metric in after.get("intervals", ())}
    trainer.card.intervals |= intervals_in_words(after)
    return summary


def add_results(
    trainer: Any, arguments: ParsedArguments, summary: Mapping[str, Any], credits: Sequence[TokenCredit]
) -> None:
    """
    Draws `learning.png`, `tokens.png` where there are credits, and `reliability.png` where prompts were chosen by a
    prediction, and adds a section with them to the model card. Only the main process makes the call.
    """
    folder, script_args = Path(trainer.args.output_dir), arguments.script
    title = f"{summary['method']} · {arguments.model.model_name_or_path} · {script_args.dataset_name}"
    figure = plot_learning(trainer.state.log_history, folder / PICTURES[0], title)
    reliability = plot_reliability(trainer.state.log_history, folder / PICTURES[2], title)
    section = results_section(
        dict(summary),
        figure.name,
        config_text(script_args.config_file),
        plot_tokens(credits, folder / PICTURES[1], title).name if credits else None,
        None if reliability is None else reliability.name,
    )
    trainer.card.sections.append(lambda: section)


def closing_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """What a run ends with: how good the policy was and is, and where the pictures and all numbers are."""
    before, after = summary["before"] or {}, summary["after"]
    lines = []
    for name in after["intervals"] if after else ():
        measured = [
            f"{part[name]:.2f} ({part['intervals'][name][0]:.2f} to {part['intervals'][name][1]:.2f})"
            for part in (before, after)
            if name in part
        ]
        lines.append(f"{name.replace('_', ' ')}: {' → '.join(measured)}, 95 % intervals, {after['prompts']} held out")
    pictures = [str(path) for name in PICTURES if (path := folder / name).is_file()]
    return [*lines, f"pictures: {', '.join(pictures)}"] if pictures else lines


def publish(trainer: Any, dataset_name: str | None, summary: Mapping[str, Any] | None = None) -> None:
    """
    Writes a card beside the model, says what the `summary` of the main process holds, and uploads all to the Hub if
    `--push_to_hub` is given.
    """
    dataset = on_the_hub(dataset_name)
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        run, example = read_run(folder), example_of(trainer.train_dataset, trainer.processing_class)
        trainer.card.sections.append(lambda: details(run, trainer.hub_model_id or as_written(folder), example))
    trainer.create_model_card(model_name=folder.name, dataset_name=dataset)
    trainer.accelerator.print(f"Saved to {folder}. How to use the model: {folder / 'README.md'}")
    told = [*lines(bands_of(trainer)), *([] if summary is None else closing_lines(summary, folder))]
    if told:
        trainer.accelerator.print("\n".join(told), flush=True)
    if trainer.args.push_to_hub:
        repo_id = trainer.hub_model_id or trainer.args.hub_model_id or folder.name  # without an id if the Hub was away
        with uploading(
            folder,
            repo_id if trainer.is_world_process_zero() else None,
            NOT_PUSHED,
            trainer.args.hub_revision,
            private=trainer.args.hub_private_repo,
        ):
            trainer.push_to_hub(dataset_name=dataset)
    leave(trainer)


def leave(trainer: Any = None) -> None:
    """
    Ends a run: finishes a trainer's trackers, and the process group. Nothing that needs other processes may follow.
    """
    if trainer is not None:
        trainer.accelerator.end_training()
    state: Any = PartialState()
    state.destroy_process_group()
    if state.num_processes > 1:
        # A thread of gloo that releases its last tensor after the interpreter has ended aborts the process
        time.sleep(0.1)


def on_the_hub(name: str | None) -> str | None:
    """`name`, or `None` if it is a local file or folder, or made: a card can't link it."""
    return None if name is None or Path(name).exists() or name.startswith(GYM) else name


def config_text(file: Path | None) -> str | None:
    """The text of the yaml file that a run was started with."""
    return None if file is None else file.read_text(encoding="utf-8")


def command_line(script: str, argv: Sequence[str], processes: int) -> str:
    """
    The command that repeats a run: `trl-ext run` for an installed recipe, otherwise `accelerate launch`.

    Args:
        script (`str`):
            The program that ran, as `sys.argv[0]` has it.
        argv (`Sequence[str]`):
            Arguments of the program.
        processes (`int`):
            Number of processes.
    """
    count = ["--num_processes", str(processes)] if processes > 1 else []
    file, installed = Path(script), recipes_folder()
    if not file.is_absolute() or not file.is_relative_to(installed):
        return shlex.join(["accelerate", "launch", *count, script, *argv])
    configs = installed / "configs"
    named = [word if Path(word).parent != configs else Path(word).name for word in argv]
    return shlex.join(["trl-ext", "run", file.stem, *count, *named])
