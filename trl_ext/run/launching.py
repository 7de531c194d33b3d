"""How a recipe is started: in this process, or in several through Accelerate's launcher."""

import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from .files import find_file


def run_here(script: Path, argv: Sequence[str]) -> None:
    """Runs a script in this process, as `python script` does."""
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def run_by_accelerate(script: Path, argv: Sequence[str], options: Sequence[str]) -> None:
    """
    Runs a script as `accelerate launch` does, with the launcher's own options before it. If the script fails, this
    process ends with a status and without a traceback of the launcher's: the script has said why.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args([*options, str(script), *argv]))
    except subprocess.CalledProcessError as error:  # one process
        sys.exit(error.returncode)
    except ChildFailedError as error:  # several
        _, first = error.get_first_failure()
        sys.exit(first.exitcode)


def options_of_config(file: Path) -> list[str]:
    """
    The launcher's options for an Accelerate configuration. DeepSpeed's file, which it may name, is found where
    [`~trl_ext.run.files.find_file`] finds it; Accelerate itself only looks in the working directory.

    Raises:
        UserError: if DeepSpeed's file is in none of these places.
    """
    options = ["--config_file", str(file)]
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    named = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if named is None:
        return options
    found = find_file(named, f"deepspeed_config_file of {file} is '{named}'", file.parent)
    return options if str(found) == named else [*options, "--deepspeed_config_file", str(found)]
