"""Values of yaml files as what they are meant to be. What is refused is in `test_wrong_command_lines.py`."""

from typing import Any, Literal

import pytest
from transformers.trainer_utils import IntervalStrategy

import trl_ext
from trl_ext.errors import UserError
from trl_ext.run import parsing
from trl_ext.run.arguments import PolicyArguments, parse_arguments


def parsed(tmp_path, text: str, *argv: str):
    (tmp_path / "a.yaml").write_text(text)
    config = f"--config={tmp_path / 'a.yaml'}"
    return parse_arguments(PolicyArguments, trl_ext.GRPOConfig, ["--model_name_or_path", "m", config, *argv])


def test_one_value_is_a_list_of_one(tmp_path):
    script, training, _, _ = parsed(tmp_path, "reward_funcs: rewards.py:even\nreward_weights: 1.0\n")
    assert script.reward_funcs == ["rewards.py:even"]
    assert training.reward_weights == [1.0]
    assert script.config_file == tmp_path / "a.yaml"


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("[q_proj]", ["q_proj"]),
        ("q_proj", ["q_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        ("[all-linear]", "all-linear"),
        ("'.*q_proj'", ".*q_proj"),  # a pattern that whole names match
    ],
)
def test_modules_of_adapters(written, taken, tmp_path):
    assert parsed(tmp_path, f"lora_target_modules: {written}\n").model.lora_target_modules == taken
    if not written.startswith("["):
        assert parsed(tmp_path, "{}\n", "--lora_target_modules", written.strip("'")).model.lora_target_modules == taken


@pytest.mark.parametrize(
    ("value", "hint", "taken"),
    [
        ("1e-6", float, "1e-6"),  # a text for YAML; the parser reads it
        (1, float, 1.0),
        (2.0, int, 2),
        (1, bool, True),
        (2024, str | None, "2024"),
        (True, str | None, "true"),
        (None, int, None),
        ({"a": 1}, dict[str, Any] | str | None, {"a": 1}),
        (["1e-3", 2], list[float] | None, [1e-3, 2.0]),
        ([1, "a"], list[str], ["1", "a"]),
        ("steps", IntervalStrategy | str, "steps"),
        (["a"], str | list[str], ["a"]),
        ("a", str | list[str], "a"),
        ([{"path": "x"}], list[PolicyArguments] | None, [{"path": "x"}]),
        ("a", Literal["a"], "a"),
    ],
)
def test_values_as_their_arguments_mean_them(value, hint, taken):
    found = parsing.as_meant("x", value, hint)
    assert found == taken and type(found) is type(taken)


def test_an_unquoted_no_is_a_choice():
    assert parsing.as_meant("save_strategy", False, IntervalStrategy | str) == "no"
    assert parsing.as_meant("x", False, str, ["no", "yes"]) == "no"
    with pytest.raises(UserError, match=r"--save_strategy is True in the yaml file\. Choose one of no, steps, epoch"):
        parsing.as_meant("save_strategy", True, IntervalStrategy | str)


def test_an_installed_configuration_by_name():
    assert parsing.config_file(["--config", "quickstart_dapo"]).name == "quickstart_dapo.yaml"
    assert parsing.words_of(["--a=b", "--config=x=y.yaml"]) == ["--a=b", "--config", "x=y.yaml"]


def test_the_nearest_name():
    names = ["learning_rate", "num_train_epochs", "beta"]
    assert parsing.nearest("--learning-rat", names) == " Did you mean --learning_rate?"
    assert parsing.nearest("epochs", names) == " Did you mean --num_train_epochs?"
    assert parsing.nearest("--nothing", names) == " `--help` lists them."
