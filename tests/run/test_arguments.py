"""Arguments from command lines and yaml files."""

import os

import pytest

import trl_ext
from trl_ext.errors import UserError
from trl_ext.run.arguments import DataArguments, PolicyArguments, as_mapping, parse_arguments, peek
from trl_ext.run.parsing import config_file


def parse(*argv: str, config_class=trl_ext.GRPOConfig):
    return parse_arguments(PolicyArguments, config_class, list(argv))


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_what_a_recipe_sets_gives_way_to_the_user(tmp_path):
    defaults = {"advantage_estimator": "reinforce", "reinforce_baseline_momentum": 0.9}

    def momentum(*argv: str) -> float | None:
        argv = ("--model_name_or_path", "m", "--output_dir", str(tmp_path), *argv)
        parsed = parse_arguments(PolicyArguments, trl_ext.GRPOConfig, list(argv), defaults)
        return parsed[1].reinforce_baseline_momentum

    (tmp_path / "a.yaml").write_text("reinforce_baseline_momentum: 0.7\n")
    assert momentum() == 0.9
    assert momentum("--config", str(tmp_path / "a.yaml")) == 0.7
    assert momentum("--reinforce_baseline_momentum", "0.5") == 0.5


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\nlearning_rate: 0.5\nmax_steps: 3\nheld_out_prompts: 5\n")
    script_args, training_args, model_args, _ = parse("--config", str(tmp_path / "a.yaml"), "--learning_rate", "0.25")
    assert (training_args.learning_rate, training_args.max_steps) == (0.25, 3)
    assert (script_args.held_out_prompts, model_args.model_name_or_path) == (5, "m")


def test_the_file_that_was_read_is_known_and_no_argument(tmp_path):
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\n")
    assert parse("--config", str(tmp_path / "a.yaml")).script.config_file == tmp_path / "a.yaml"
    assert parse("--model_name_or_path", "m").script.config_file is None
    assert config_file(["--max_steps", "1"]) is None
    with pytest.raises(ValueError, match="--config_file"):
        parse("--model_name_or_path", "m", "--config_file", "b.yaml")


def test_settings_without_an_accelerator_are_chosen_and_said(tmp_path, no_accelerator, capsys):
    _, training_args, _, _ = parse("--model_name_or_path", "m", "--output_dir", str(tmp_path))
    assert (training_args.use_cpu, training_args.bf16, training_args.gradient_checkpointing) == (True, False, False)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("No accelerator in use: use_cpu=True, bf16=False, gradient_checkpointing=False")


def test_what_the_user_says_about_them_stands(no_accelerator, capsys):
    _, training_args, _, _ = parse("--model_name_or_path", "m", "--gradient_checkpointing", "true")
    assert training_args.gradient_checkpointing is True
    assert "gradient_checkpointing=True" in capsys.readouterr().out


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        parse("--learning_rate", "0.1")
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\nlerning_rate: 0.5\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        parse("--config", str(tmp_path / "a.yaml"))


def test_what_a_configuration_refuses_is_an_error_of_the_user():
    with pytest.raises(UserError, match="importance_sampling_level"):
        parse("--model_name_or_path", "m", "--importance_sampling_level", "word", "--use_cpu", "true")


def test_a_token_is_not_among_the_arguments_that_are_saved(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "before")
    _, training_args, _, _ = parse("--model_name_or_path", "m", "--hub_token", "hf_secret")
    assert training_args.hub_token is None and os.environ["HF_TOKEN"] == "hf_secret"


def test_an_argument_that_decides_which_others_there_are(tmp_path):
    (tmp_path / "a.yaml").write_text("method: GSPO\n")
    config = ["--config", str(tmp_path / "a.yaml")]
    assert peek([], "method", ("PPO", "GSPO")) == "PPO"
    assert peek(config, "method", ("PPO", "GSPO")) == "GSPO"
    assert peek([*config, "--method", "PPO", "--lr", "1"], "method", ("PPO", "GSPO")) == "PPO"
    with pytest.raises(UserError, match=r"--method is 'GSPO'\. Choose one of PPO, DAPO"):
        peek(config, "method", ("PPO", "DAPO"))


def test_arguments_within_an_argument():
    given = {"beta": 1}
    found = as_mapping(given, "dpo")
    found["beta"] = 2
    assert given == {"beta": 1}  # a copy
    assert as_mapping('{"beta": 0.5}', "dpo") == {"beta": 0.5}
    assert as_mapping(None, "dpo") == {}
    for value, message in {"{beta: 1}": "which is no JSON", "[1]": "Write a mapping"}.items():
        with pytest.raises(UserError, match=message):
            as_mapping(value, "dpo")


def test_supervised_recipes_have_no_rewards():
    with pytest.raises(ValueError, match="reward_funcs"):
        argv = ["--model_name_or_path", "m", "--reward_funcs", "accuracy_reward"]
        parse_arguments(DataArguments, trl_ext.DPOConfig, argv)
