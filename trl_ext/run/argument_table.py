"""
Every argument of every configuration and recipe in one table, read from the dataclasses: `docs/arguments.md`.

```shell
python -m trl_ext.run.argument_table  # writes the page again; a test says when it is old
```
"""

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NamedTuple

import trl
from transformers import TrainingArguments

from .. import public
from . import arguments


PAGE = Path(__file__).parents[2] / "docs" / "arguments.md"
BEGIN, END = "<!-- arguments -->\n", "<!-- end of arguments -->\n"

# What a method's configuration is called in the column of defaults
CONFIGS: dict[str, type] = {
    name.removesuffix("Config"): getattr(public, name) for name in public.__all__ if name.endswith("Config")
}
# TRL's own trainers, which recipes start; what all recipes take; and what some take beside that
CONFIGS |= {"SFT": trl.SFTConfig, "reward": trl.RewardConfig}
RECIPES: tuple[type, ...] = (
    arguments.DataArguments,
    arguments.PolicyArguments,
    arguments.PPOArguments,
    arguments.DPOArguments,
    arguments.HybridArguments,
    arguments.FilterArguments,
    arguments.PairArguments,
    trl.ModelConfig,
    trl.DatasetMixtureConfig,
)


class Argument(NamedTuple):
    """An argument, and the class that defined it first, which said what it means."""

    name: str
    source: type


def of_class(config: type) -> dict[Argument, Field[Any]]:
    """The arguments of a dataclass that a user can set, with the values that they have there."""
    found = {}
    for entry in fields(config):
        if entry.init:
            owners = [parent for parent in config.__mro__ if entry.name in inspect.get_annotations(parent)]
            found[Argument(entry.name, owners[-1])] = entry
    return found


def default_of(entry: Field[Any]) -> str:
    """The default of an argument as a reader of Python and YAML writes it."""
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if value is MISSING:
        return "required"
    return f"`{getattr(value, 'value', value)!r}`".replace("'", '"')  # of an enumeration, what it stands for


def defaults(argument: Argument) -> str:
    """The default, and after it those of the methods that have another one."""
    by_value: dict[str, list[str]] = {}
    for name, config in CONFIGS.items():
        entry = of_class(config).get(argument)
        if entry is not None:
            by_value.setdefault(default_of(entry), []).append(name)
    if not by_value:
        return next(default_of(found[argument]) for found in map(of_class, RECIPES) if argument in found)
    if len(by_value) == 1:
        return next(iter(by_value))
    usual = max(by_value, key=lambda value: len(by_value[value]))
    others = [f"{', '.join(names)} {value}" for value, names in by_value.items() if value != usual]
    return "; ".join([usual, *others])


def meaning(argument: Argument) -> str:
    """The help text of the class that defined it, on one line of a table."""
    entry = next(entry for entry in fields(argument.source) if entry.name == argument.name)
    words = " ".join(str(entry.metadata.get("help", "")).split())
    for sign in "|<*":
        words = words.replace(sign, f"\\{sign}")
    return words


def source(kind: type) -> str:
    """The class, and where it is: a link for a file of this repository."""
    module = kind.__module__
    if module.startswith("trl_ext."):
        return f"[`{kind.__name__}`](../{module.replace('.', '/')}.py)"
    return f"{'TRL' if module.startswith('trl.') else module.split('.')[0]} `{kind.__name__}`"


def table() -> str:
    """The table in Markdown: what is ours first, then TRL's, then transformers'."""
    found = dict.fromkeys(argument for kind in (*CONFIGS.values(), *RECIPES) for argument in of_class(kind))

    def order(argument: Argument) -> Any:
        ours = not argument.source.__module__.startswith("trl_ext.")
        of_recipes = argument.source.__module__ == arguments.__name__
        return ours, argument.source is TrainingArguments, of_recipes, argument.source.__name__, argument.name

    rows = [
        f"| `{argument.name}` | {defaults(argument)} | {meaning(argument)} | {source(argument.source)} |"
        for argument in sorted(found, key=order)
    ]
    return "\n".join(["| argument | default | meaning | source |", "| --- | --- | --- | --- |", *rows, ""])


def with_table(page: str) -> str:
    """A page with the table of today between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
