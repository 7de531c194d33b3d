"""
The `trl-ext` command: recipes without a copy of the repository.

```shell
trl-ext recipes                                                  # what there is
trl-ext run sort_digits --output_dir runs/sort_digits            # data for the quickstart
trl-ext run sft --config quickstart_sft.yaml
trl-ext run dapo --config quickstart_dapo.yaml --max_steps 60    # any argument of the recipe
trl-ext run ppo --num_processes 4 --accelerate_config 4xa100_80g.yaml --config mine.yaml
trl-ext copy dapo mine                                           # to change it
trl-ext run ppo --config mine.yaml --dry_run                     # check everything, train nothing
trl-ext plan --method ppo --model 33b --layout 4xa100-80g        # will it fit?
trl-ext export runs/ppo --role policy --merge                    # plain weights of what a run has trained
trl-ext report runs/dapo runs/grpo                               # runs side by side, in one HTML file
```

A subcommand is one function here, which imports what it needs: `trl-ext recipes` answers without importing torch.
"""

import argparse
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import UserError
from .run.program import DEBUG, STATUS, Parser, preparing, say, without_debug


PROGRAM = "trl-ext"


def recipes(argv: Sequence[str]) -> None:
    """Lists the recipes, with a phrase and the configurations of each."""
    from .run.catalogue import list_recipes

    Parser(f"{PROGRAM} recipes", description=recipes.__doc__).parse_args(argv)
    found = list_recipes()
    names = max(len(recipe.name) for recipe in found) + 2
    width = min(shutil.get_terminal_size().columns, 119) - names
    table: list[str] = []
    for recipe in found:
        lines = textwrap.wrap(recipe.phrase, width)
        if recipe.configs:
            lines += textwrap.wrap(f"configs: {', '.join(recipe.configs)}", width, break_on_hyphens=False)
        table += [f"{recipe.name if i == 0 else '':<{names}}{line}" for i, line in enumerate(lines)]
    print("\n".join(table))


def run(argv: Sequence[str]) -> None:
    """Runs a recipe, in this process or through Accelerate's launcher."""
    parser = _run_parser()
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            return parser.print_help()
        raise UserError(f"name a recipe first: {PROGRAM} run RECIPE. `{PROGRAM} recipes` lists them.")

    from .run.catalogue import find_config, find_recipe
    from .run.launching import options_of_config, run_by_accelerate, run_here

    script = find_recipe(argv[0]).file
    words = list(argv[1:])
    if "--launch" in words:  # whose value may begin with dashes, which argparse takes with an equals sign only
        at = words.index("--launch")
        words[at : at + 2] = ["=".join(words[at : at + 2])]
    given, arguments = parser.parse_known_args(words)
    if given.config is not None:
        arguments = ["--config", str(find_config(given.config, "configs", "--config")), *arguments]
    try:
        options = shlex.split(given.launch)
    except ValueError as error:
        raise UserError(f"--launch is '{given.launch}': {error}.") from error
    if given.accelerate_config is not None:
        options += options_of_config(find_config(given.accelerate_config, "accelerate", "--accelerate_config"))
    if given.num_processes is not None:
        options += ["--num_processes", str(given.num_processes)]
    if options:
        run_by_accelerate(script, arguments, options)
    else:
        run_here(script, arguments)


def _run_parser() -> Parser:
    parser = Parser(
        f"{PROGRAM} run",
        usage=f"{PROGRAM} run RECIPE [options] [arguments of the recipe]",
        description=f"{run.__doc__} RECIPE is a name that `{PROGRAM} recipes` lists, or the path of a script.",
        epilog=f"`{PROGRAM} run RECIPE --help` lists the arguments of the recipe.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--config", metavar="FILE", help="yaml file with arguments: a path, or the name of one listed")
    parser.add_argument("--num_processes", metavar="N", type=int, help="start so many through Accelerate's launcher")
    parser.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help="Accelerate's yaml file: a path, or the name of one in recipes/accelerate, such as 4xa100_80g.yaml",
    )
    parser.add_argument(
        "--launch",
        metavar="OPTIONS",
        default="",
        help="options of `accelerate launch`, quoted: '--mixed_precision bf16'",
    )
    return parser


def copy(argv: Sequence[str]) -> None:
    """Copies a recipe with its configurations into a folder, to be changed there."""
    from .run.catalogue import copy_recipe, find_recipe

    parser = Parser(f"{PROGRAM} copy", description=copy.__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help=f"a name that `{PROGRAM} recipes` lists")
    parser.add_argument("folder", metavar="DIR", type=Path, help="destination; made if it doesn't exist")
    given = parser.parse_args(argv)
    copies = copy_recipe(find_recipe(given.recipe), given.folder)
    print("\n".join(map(str, copies)))
    config = next((["--config", str(path)] for path in copies if path.suffix == ".yaml"), [])
    print("Run it:", shlex.join(["accelerate", "launch", str(copies[0]), *config]))


def export(argv: Sequence[str]) -> None:
    """Writes a role of a run as plain weights: merged into its base, or as an adapter."""
    given = _export_parser().parse_args(argv)
    from .run.quiet import be_quiet

    be_quiet()
    from .pipelines.exporting import export_role

    with preparing():
        exported = export_role(**vars(given))
    print(f"Saved to {exported.folder}: {exported.form}.")
    print("\n".join([*exported.notes, f"Load it: {exported.load}"]))


def _export_parser() -> Parser:
    parser = Parser(
        f"{PROGRAM} export",
        description=f"{export.__doc__} What it writes is loaded by plain transformers and peft, and comes with the "
        "tokenizer, the chat template and the generation settings.",
        epilog="Without --merge, an adapter is copied as it is. The manual: docs/checkpoints.md.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a run, a stage of a run, or one checkpoint")
    parser.add_argument(
        "--role", metavar="ROLE", default="policy", help="policy (the default), critic, reward or reference"
    )
    parser.add_argument("--merge", action="store_true", help="merge the role's adapter into its base")
    parser.add_argument(
        "--checkpoint",
        metavar="N",
        help="step of a checkpoint, `last` or `best`; by default what the run ended with, or its last checkpoint",
    )
    parser.add_argument("--output", metavar="DIR", help="new folder; by default exported/ROLE in that of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it has files in it")
    parser.add_argument(
        "--base", metavar="MODEL", help="folder or Hub id of the base, in place of the one that the adapter names"
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float32, bfloat16 or float16; by default that of what is copied, or of the base that is merged into",
    )
    parser.add_argument(
        "--full_precision",
        action="store_true",
        help="merge an adapter that was trained on a 4-bit base into the base as it was before it was quantized",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    return parser


def report(argv: Sequence[str]) -> None:
    """Writes one HTML file about one run, or several side by side."""
    parser = Parser(
        f"{PROGRAM} report",
        description=f"{report.__doc__} It has settings (of several runs those that differ), held-out results with "
        "intervals, curves, health checks in words, and completions that improved and that got worse. Pictures are in "
        "the file itself. A run that is under way is read from its newest checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folder of a run")
    parser.add_argument(
        "--output", metavar="FILE", help="by default report.html: in the folder of a single run, or else here"
    )
    given = parser.parse_args(argv)
    from .run.quiet import be_quiet

    be_quiet()
    from .reports.run_report import write_report

    print(f"Written: {write_report(given.runs, given.output)}")


def plan(argv: Sequence[str]) -> int:
    """Says whether a method fits on GPUs, by phases, before anything is loaded."""
    from .run.planning import plan_parser, run_plan

    return run_plan(plan_parser(f"{PROGRAM} plan", str(plan.__doc__)).parse_args(argv))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "recipes": recipes,
    "run": run,
    "copy": copy,
    "export": export,
    "report": report,
    "plan": plan,
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    The `trl-ext` command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments without the program's name, by default those of the process.

    Returns:
        `int`: exit status: 0, 1 where a plan doesn't fit, or 2 where the arguments can't be used; one line on the
        standard error says why.
    """
    words, debug = without_debug(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        PROGRAM,
        usage=f"{PROGRAM} [--help] [--version] COMMAND ... [--debug]",
        description="Recipes of trl_ext, an extension layer on Hugging Face TRL.",
        epilog="commands:\n" + "\n".join(f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl_ext {_version()}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"see `{PROGRAM} COMMAND --help`")
    try:
        command = COMMANDS[parser.parse_args(words[:1]).command]
        # A recipe has errors of its own
        status = command([*words[1:], DEBUG] if debug and command is run else words[1:])
    except UserError as error:
        if debug:
            raise
        say(error, PROGRAM)
        return STATUS
    return status or 0


def _version() -> str:
    try:
        return version("trl_ext")
    except PackageNotFoundError:  # a checkout that is used without being installed
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
