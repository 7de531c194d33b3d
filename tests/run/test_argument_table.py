"""The table of all arguments is what the classes say today."""

import dataclasses

import pytest

import trl_ext
from trl_ext.run import argument_table
from trl_ext.run.argument_table import Argument
from trl_ext.run.arguments import HybridArguments


def test_the_page_is_that_of_the_classes() -> None:
    """If it is old: `python -m trl_ext.run.argument_table`."""
    page = argument_table.PAGE.read_text(encoding="utf-8")
    assert argument_table.with_table(page) == page


def test_every_argument_of_every_configuration_has_one_row_a_source() -> None:
    rows = argument_table.table().splitlines()[2:]
    assert len(rows) == len(set(rows))
    assert all(row.count(" | ") == 3 for row in rows)
    named = {row.split("`")[1] for row in rows}
    configs = [getattr(trl_ext, name) for name in trl_ext.__all__ if name.endswith("Config")]
    for kind in [*configs, HybridArguments]:
        assert {entry.name for entry in dataclasses.fields(kind) if entry.init} <= named, kind
    assert {row.count("||") for row in rows} == {0}, "an argument without a meaning"


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("epsilon_high", "GRPOConfig", "`0.28`; GRPO, PPO, RLOO `None`; GSPO `0.0004`"),
        ("lam", "PPOConfig", "`0.95`"),
        ("critic_lam", "PPOConfig", "`None`; VAPO `1.0`"),
        ("beta", "DPOConfig", "`0.1`"),
        ("refill_draws", "GRPOConfig", '`"blind"`'),
    ],
)
def test_methods_with_other_defaults_are_named(name: str, config: str, expected: str) -> None:
    (argument,) = (found for found in argument_table.of_class(getattr(trl_ext, config)) if found.name == name)
    assert argument_table.defaults(argument) == expected


def test_the_source_is_the_class_that_defined_it_first() -> None:
    found = {argument.name: argument for argument in argument_table.of_class(trl_ext.VAPOConfig)}
    sources = {
        name: found[name].source.__name__ for name in ("lam", "advantage_estimator", "epsilon", "learning_rate")
    }
    assert sources == {
        "lam": "PPOConfig",
        "advantage_estimator": "GRPOConfig",
        "epsilon": "GRPOConfig",
        "learning_rate": "TrainingArguments",
    }
    assert argument_table.source(found["lam"].source) == "[`PPOConfig`](../trl_ext/trainers/ppo_config.py)"
    assert argument_table.source(found["epsilon"].source) == "TRL `GRPOConfig`"


def test_what_is_no_argument_is_left_out() -> None:
    assert "config_file" not in {argument.name for argument in argument_table.of_class(HybridArguments)}
    assert Argument("method", HybridArguments) in argument_table.of_class(HybridArguments)
