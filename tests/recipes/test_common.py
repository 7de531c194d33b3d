"""What the recipes share: arguments, data, reward functions."""

import os
from pathlib import Path

import common
import dpo
import dpo_then_ppo
import make_pairs
import pytest
import tiny
import trl.rewards
from datasets import DatasetDict
from trl import DatasetMixtureConfig, ModelConfig, RewardConfig, SFTConfig

import trl_ext


RECIPES = Path(common.__file__).parent
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
CONFIG_CLASSES = {name.lower(): getattr(trl_ext, f"{name}Config") for name in ("GRPO", "DAPO", "DUPO", "GSPO", "PPO")}
CONFIG_CLASSES |= {"rloo": trl_ext.GRPOConfig, "reinforce": trl_ext.GRPOConfig}
# With arguments of their own
SUPERVISED = {
    "pairs": (make_pairs.PairArguments, trl_ext.GRPOConfig),
    "sft": (common.DataArguments, SFTConfig),
    "reward": (common.DataArguments, RewardConfig),
    "dpo": (dpo.DPOArguments, trl_ext.DPOConfig),
    "hybrid": (dpo_then_ppo.HybridArguments, trl_ext.PPOConfig),
}


def script(**arguments) -> common.PolicyArguments:
    return common.PolicyArguments(**arguments)


def parse(*argv: str, config_class=trl_ext.GRPOConfig):
    return common.parse_arguments(common.PolicyArguments, config_class, list(argv))


def rewards(tmp_path, *names: str, **arguments):
    config = trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path))
    return common.load_reward_funcs(script(reward_funcs=list(names), **arguments), config)


def test_recipes_are_short():
    for path in RECIPES.glob("*.py"):
        if path.stem != "common":
            assert len(path.read_text().splitlines()) <= 70, path.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_understood(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    method = path.stem.removeprefix("quickstart_").split("_")[0]
    if method in SUPERVISED:
        parsed = common.parse_arguments(*SUPERVISED[method], ["--config", str(path)])
        if method == "hybrid":
            stage = common.preference_stage(parsed[0], parsed[1], {})
            assert stage["dpo_args"].output_dir == parsed[1].output_dir
    else:
        parsed = parse("--config", str(path), config_class=CONFIG_CLASSES[method])
        watched = parsed[1].reward_weights or [1.0]
        assert len(common.load_reward_funcs(parsed[0], parsed[1])) == len(watched)
        if parsed[0].prepare_row is not None:
            assert callable(common.load_function(parsed[0].prepare_row, "prepare_row"))
    assert parsed[2].model_name_or_path and parsed[0].dataset_name


def test_the_tutorials_numbers_are_in_one_file(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    _, args, _, _ = parse("--config", "recipes/configs/ppo_tutorial.yaml", config_class=trl_ext.PPOConfig)
    assert (args.epsilon, args.gamma, args.lam, args.vf_coef, args.entropy_coef) == (0.2, 0.99, 0.95, 0.5, 0.01)
    usual = trl_ext.PPOConfig(output_dir="out", use_cpu=True, bf16=False)
    assert (usual.epsilon, usual.gamma, usual.lam, usual.vf_coef, usual.entropy_coef) == (0.2, 1.0, 0.95, 0.1, 0.0)


def test_dpos_tutorial_says_where_it_leaves_the_defaults(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    path = "recipes/configs/dpo_tutorial.yaml"
    _, args, model_args, _ = common.parse_arguments(dpo.DPOArguments, trl_ext.DPOConfig, ["--config", path])
    usual, usual_model = trl_ext.DPOConfig(output_dir="out", use_cpu=True, bf16=False), ModelConfig()
    assert (args.beta, args.learning_rate, model_args.use_peft) == (0.1, 5e-6, True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    # What the comments say of the defaults
    assert (usual.beta, usual.learning_rate, usual.num_train_epochs, usual.warmup_steps) == (0.1, 1e-6, 3, 0)
    assert (usual.per_device_train_batch_size, usual.gradient_accumulation_steps, usual.max_length) == (8, 1, 1024)
    assert (usual.lr_scheduler_type, usual.eval_strategy, usual.label_smoothing) == ("linear", "no", 0)
    assert (usual_model.use_peft, usual_model.lora_r, usual_model.lora_alpha) == (False, 16, 32)
    assert usual_model.lora_dropout == 0.05 and usual.disable_dropout


def test_what_a_recipe_sets_gives_way_to_the_user(tmp_path):
    defaults = {"advantage_estimator": "reinforce", "reinforce_baseline_momentum": 0.9}

    def momentum(*argv: str) -> float | None:
        argv = ("--model_name_or_path", "m", "--output_dir", str(tmp_path), *argv)
        parsed = common.parse_arguments(common.PolicyArguments, trl_ext.GRPOConfig, list(argv), defaults)
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


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


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


def test_functions_from_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\ndef one(row):\n    return {'x': 1}\n\nN = 3\n"
    )
    assert common.load_function(f"{tmp_path}/mine.py:one", "prepare_row")({}) == {"x": 1}
    assert common.load_function("os.path.join", "prepare_row") is os.path.join
    monkeypatch.chdir(tmp_path)
    assert common.load_function("mine.one", "prepare_row")({}) == {"x": 1}  # from the working directory
    for spec, message in {
        "missing.py:one": "--prepare_row is 'missing.py:one', but there is no file 'missing.py'",
        "mine.py:two": "'two' is not a function there",
        "mine.N": "'N' is not a function there",
        "nothing.here.f": "importing 'nothing.here' fails",
        "f": "importing '' fails",
    }.items():
        with pytest.raises(ValueError, match=message):
            common.load_function(spec, "prepare_row")


def test_reward_functions_by_every_name(tmp_path):
    (tmp_path / "model").mkdir()
    found = rewards(
        tmp_path,
        "accuracy_reward",
        "trl.rewards.think_format_reward",
        "recipes/tasks/sort_digits.py:exact_match",
        str(tmp_path / "model"),
        "org/reward-model-v1.5",
        "get_soft_overlong_punishment",
        reward_model_name_or_path="reward.model",
    )
    assert found[0] == "reward.model"  # said to be a model, whatever it looks like
    assert found[1:3] == [trl.rewards.accuracy_reward, trl.rewards.think_format_reward]
    assert found[3](completion_ids=[[1], [2]], answer_ids=[[1], [1]]) == [1, 0]
    assert found[4:6] == [str(tmp_path / "model"), "org/reward-model-v1.5"]
    # 6 tokens at most, of which the last fifth, 1, is punished: 5 tokens are free, the 6th costs 1
    assert found[6](completion_ids=[[0] * 5, [0] * 6]) == [0, -1]


def test_unknown_reward_functions_are_named(tmp_path):
    with pytest.raises(ValueError, match="--reward_funcs is missing"):
        rewards(tmp_path)
    with pytest.raises(ValueError, match="--reward_funcs has 'acuracy_reward'"):
        rewards(tmp_path, "acuracy_reward")
    with pytest.raises(ValueError, match=r"importing 'my\.rewards' fails"):
        rewards(tmp_path, "my.rewards.exact")


@pytest.mark.parametrize("form", ["folder", "split", "json", "jsonl", "csv", "parquet"])
def test_data_in_every_form(form, tmp_path):
    rows = tiny.prompts(3)
    path = tmp_path / f"data.{form}"
    if form == "folder":
        DatasetDict(train=rows, test=rows).save_to_disk(path)
    elif form == "split":
        rows.save_to_disk(path)
    else:
        getattr(rows, f"to_{form.removesuffix('l')}")(path)
    data = common.load_data(script(dataset_name=str(path)), DatasetMixtureConfig())
    assert data["train"]["prompt"] == rows["prompt"]
    assert data["train"]["target"] == rows["target"]
    assert ("test" in data) == (form == "folder")


def test_mixtures_and_prepared_rows(tmp_path):
    tiny.prompts(3).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "mine.py").write_text("def shout(row):\n    return {'prompt': row['prompt'].upper()}\n")
    mixture = DatasetMixtureConfig(datasets=[{"path": "parquet", "data_files": str(tmp_path / "a.parquet")}])
    data = common.load_data(script(prepare_row=f"{tmp_path}/mine.py:shout"), mixture)
    assert data["train"]["prompt"] == ["W0 W0", "W1 W0", "W2 W0"]


def test_missing_data_is_named(tmp_path):
    (tmp_path / "data.txt").write_text("w1\n")
    with pytest.raises(ValueError, match="--dataset_name is missing"):
        common.load_data(script(), DatasetMixtureConfig())
    with pytest.raises(ValueError, match=r"data.txt', but only \.json, \.jsonl, \.csv, \.parquet files"):
        common.load_data(script(dataset_name=str(tmp_path / "data.txt")), DatasetMixtureConfig())
    tiny.prompts(2).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="--dataset_streaming doesn't apply"):
        common.load_data(script(dataset_name=str(tmp_path / "saved"), dataset_streaming=True), DatasetMixtureConfig())
    with pytest.raises(ValueError, match="--dataset_train_split is 'trian', but the data set has only: train, test"):
        common.get_split({"train": 1, "test": 2}, "trian", "dataset_train_split")
