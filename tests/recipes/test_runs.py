"""The recipes, run as a user runs them, on the quickstart's task made small."""

import json
import math
import shutil
from pathlib import Path

import pytest
import quickstart
import torch
from datasets import DatasetDict, load_from_disk
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DatasetMixtureConfig

import trl_ext
from trl_ext import DPOThenPPO
from trl_ext.errors import UserError
from trl_ext.run.arguments import DataArguments
from trl_ext.run.loading import load_data
from trl_ext.run.stages import train_dpo_then_ppo
from trl_ext.run.training import train_policy


pytestmark = pytest.mark.train
ROOT = quickstart.ROOT
# The task's reward, which a model this untrained never gets, and one that tells its completions apart
REWARDS = [str(ROOT / "recipes/tasks/sort_digits.py:exact_match"), str(ROOT / "tests/tiny.py:first_token_even")]


INFORMED = ["--refill_draws", "informed"]


def policy(folder: Path, output: str, *more: str) -> list[str]:
    # Groups of 4, so that some are dead
    small = [
        "--num_generations",
        "4",
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "32",
        "--save_steps",
        "2",
        "--save_total_limit",
        "2",
    ]
    held_out = ["--held_out_prompts", "16", "--held_out_samples", "2", "--held_out_every", "2"]
    return [*quickstart.arguments("dapo", folder, "sft", output), "--reward_funcs", *REWARDS, *small, *held_out, *more]


@pytest.fixture(scope="module")
def dapo(task):
    expect = {"reward": {"2": [-9, 9]}, "held_out/first_token_even": {"4": [2, 3]}}
    argv = policy(task, "dapo", *INFORMED, "--expect", json.dumps(expect))
    return train_policy(trl_ext.DAPOTrainer, trl_ext.DAPOConfig, argv), task / "dapo"


def test_supervised_fine_tuning_writes_a_model(task):
    assert (task / "sft" / "README.md").is_file()
    trained = AutoModelForCausalLM.from_pretrained(task / "sft")
    start = AutoModelForCausalLM.from_pretrained(task / "init")
    assert not torch.equal(trained.model.embed_tokens.weight, start.model.embed_tokens.weight)


def test_a_run_leaves_everything_in_its_folder(dapo):
    trainer, folder = dapo
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.embed_tokens.weight, trainer.model.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(folder)("s31=")["input_ids"] == [17, 7, 5, 15]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "DAPO"
    assert summary["before"]["exact_match"] == 0
    assert 0 < summary["before"]["first_token_even"] < 1
    assert 0 < summary["after"]["first_token_even"] < 1
    assert (summary["after"]["prompts"], summary["after"]["samples"]) == (16, 32)
    assert summary["steps"] == 4
    assert summary["generated_tokens"] > summary["trained_tokens"] > 0
    assert 0 < summary["prediction"]["calibration_error"] < 1 and summary["prediction"]["tokens"] > 0
    held, left = summary["expected"]
    assert held["holds"] and -1 <= held["value"] <= 2
    assert not left["holds"] and left["value"] == pytest.approx(summary["after"]["first_token_even"], abs=1e-3)
    assert "| held_out/first_token_even | 4 | 2 | 3 | " in (folder / "README.md").read_text()
    for picture in ("learning.png", "reliability.png"):
        assert (folder / picture).stat().st_size > 10_000
    card = (folder / "README.md").read_text()
    assert "## Results" in card and "](learning.png)" in card and "](reliability.png)" in card


def test_held_out_prompts_come_from_the_test_split(dapo):
    trainer, _ = dapo
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "HeldOut")
    prompts = [row["prompt"] for row in callback.dataset]
    assert len(set(prompts)) == 16
    assert not set(prompts) & set(trainer.train_dataset["prompt"])
    assert list(callback.measured) == [0, 2, 4]


def test_a_resumed_run_ends_as_the_uninterrupted_one(dapo, task):
    trainer, folder = dapo
    (task / "resumed").mkdir()
    shutil.copytree(folder / "checkpoint-2", task / "resumed" / "checkpoint-2")
    argv = policy(task, "resumed", *INFORMED, "--resume_from_checkpoint", "true")
    resumed = train_policy(trl_ext.DAPOTrainer, trl_ext.DAPOConfig, argv)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    whole, rest = (json.loads((task / run / "summary.json").read_text()) for run in ("dapo", "resumed"))
    for key in ("before", "after", "prediction", "generated_tokens", "trained_tokens", "generation_rounds", "steps"):
        assert whole[key] == rest[key], key


def trainers_made(monkeypatch):
    """A list of the trainers that a recipe constructs."""
    made = []
    init = trl_ext.GRPOTrainer.__init__

    def remembered(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(trl_ext.GRPOTrainer, "__init__", remembered)
    return made


@pytest.fixture(scope="module")
def reward_model(task):
    argv = [*quickstart.arguments("reward", task, "sft", "reward_model"), "--max_steps", "30", "--eval_steps", "30"]
    quickstart.start("reward", [*argv, "--per_device_eval_batch_size", "40"])
    return task / "reward_model"


def test_a_reward_model_of_its_own(task, reward_model):
    argv = [*quickstart.arguments("reward", task, "sft", "whole_reward_model"), "--max_steps", "2"]
    argv += ["--eval_strategy", "no", "--eval_on_start", "false"]
    quickstart.start("reward", [*argv, "--use_peft", "false"])
    assert AutoModelForSequenceClassification.from_pretrained(task / "whole_reward_model").num_labels == 1
    # What the quickstart's configuration saves is plain PEFT
    saved = json.loads((reward_model / "adapter_config.json").read_text())
    assert (saved["task_type"], saved["r"]) == ("SEQ_CLS", 16)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    assert loaded.base_model.model.score.modules_to_save["default"].weight.any()


def test_a_reward_model_says_how_many_pairs_it_ranks_right(reward_model):
    summary = json.loads((reward_model / "summary.json").read_text())
    assert (summary["before"]["step"], summary["after"]["step"]) == (0, 30)
    for measured in (summary["before"], summary["after"]):
        low, high = measured["intervals"]["pair_accuracy"]
        assert 0 <= low < measured["pair_accuracy"] <= high <= 1
        assert measured["prompts"] == 40
    assert set(summary["gain"]["intervals"]) == {"pair_accuracy"}
    assert (reward_model / "README.md").is_file()


def test_ppo_from_pairs_to_pictures(task, reward_model, monkeypatch):
    made = trainers_made(monkeypatch)
    argv = [*quickstart.arguments("ppo", task, "sft", "ppo"), "--reward_model_name_or_path", str(reward_model)]
    argv += ["--reward_funcs", REWARDS[0], "--held_out_prompts", "16", "--held_out_samples", "2"]
    argv += ["--max_steps", "4", "--per_device_train_batch_size", "16", "--held_out_every", "0"]
    quickstart.start("ppo", argv)
    folder = task / "ppo"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("PPO", 4)
    assert set(summary["before"]["intervals"]) == {"exact_match", "reward_model"}
    assert set(summary["critic"]) == {"value_loss", "explained_variance", "kl"}
    assert all(math.isfinite(number) for number in summary["critic"].values())
    learned = json.loads((reward_model / "summary.json").read_text())
    assert summary["reward_model"]["pair_accuracy"] == learned["after"]["pair_accuracy"]
    for picture in ("learning.png", "tokens.png"):
        assert (folder / picture).stat().st_size > 10_000
    card = (folder / "README.md").read_text()
    assert "](learning.png)" in card and "](tokens.png)" in card
    assert "| of 40 held-out pairs, it ranks right |" in card
    # Policy and reward model were adapters of one model. The policy's is saved, apart from its critic
    (trainer,) = made
    assert list(trainer.model.peft_config) == ["default", "reward"]
    assert not (folder / "reward").exists()
    assert (folder / "adapter_model.safetensors").is_file()
    policy = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(trl_ext.load_critic(folder / "critic", policy), torch.nn.Module)


def test_vapo_leaves_its_critic_and_its_card(task):
    argv = [*quickstart.arguments("vapo", task, "sft", "vapo"), "--held_out_prompts", "16", "--held_out_samples", "2"]
    argv += ["--max_steps", "4", "--critic_warmup_steps", "2", "--per_device_train_batch_size", "16"]
    quickstart.start("vapo", [*argv, "--held_out_every", "0", "--reward_funcs", *REWARDS])
    folder = task / "vapo"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["steps"]) == ("VAPO", 4)
    assert set(summary["critic"]) >= {"value_loss", "explained_variance"}
    assert "https://huggingface.co/papers/2504.05118" in (folder / "README.md").read_text()
    policy = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(trl_ext.load_critic(folder / "critic", policy), torch.nn.Module)


@pytest.mark.parametrize(
    ("recipe", "estimator"), [("rloo", "leave_one_out"), ("reinforce", "reinforce"), ("maxrl", "maxrl")]
)
def test_recipes_with_another_baseline(recipe, estimator, task, monkeypatch):
    made = trainers_made(monkeypatch)
    argv = quickstart.arguments("sft", task, "sft", recipe)[
        2:
    ]  # these have other arguments than the quickstart's DAPO
    argv += ["--reward_funcs", *REWARDS, "--max_completion_length", "14", "--held_out_prompts", "0"]
    quickstart.start(
        recipe, [*argv, "--max_steps", "2", "--per_device_train_batch_size", "16", "--learning_rate", "1e-3"]
    )
    (trainer,) = made
    assert trainer.args.advantage_estimator == estimator
    assert isinstance(trainer, trl_ext.RLOOTrainer) == (recipe == "rloo")
    assert trainer.state.global_step == 2
    assert (task / recipe / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["GRPO", "DUPO", "GSPO"])
def test_the_other_methods(name, task, capsys):
    trainer_class, config_class = getattr(trl_ext, f"{name}Trainer"), getattr(trl_ext, f"{name}Config")
    argv = policy(task, name, "--max_steps", "2", "--use_peft", "--lora_target_modules", "q_proj", "v_proj")
    argv += ["--verify", "true"]
    trainer = train_policy(trainer_class, config_class, argv)
    summary = json.loads((task / name / "summary.json").read_text())
    assert summary["method"] == name
    assert summary["trainable_parameters"] == 2 * 2 * (64 * 16 + 16 * 64)  # layers, projections, A and B of rank 16
    assert (task / name / "adapter_model.safetensors").is_file()
    assert trainer.state.global_step == 2
    assert "relative gradient error" in capsys.readouterr().out


def test_a_data_set_without_test_split_trains_unmeasured(task, tmp_path, capsys):
    load_from_disk(task / "data")["train"].to_parquet(tmp_path / "train.parquet")
    argv = policy(task, "unmeasured", "--max_steps", "1", "--dataset_name", str(tmp_path / "train.parquet"))
    train_policy(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, argv)
    assert "No held-out evaluation: the data set has no split 'test'" in capsys.readouterr().out
    assert json.loads((task / "unmeasured" / "summary.json").read_text())["after"] is None


def test_filtered_prompts_are_the_next_data_set(task, capsys):
    output = task / "filtered"
    settings = ["--dataset_train_split", "test", "--num_generations", "4", "--per_device_train_batch_size", "32"]
    files = [*quickstart.arguments("dapo", task, "sft", "filtered")[2:], "--reward_funcs", *REWARDS, *settings]
    quickstart.start("filter_prompts", [*files, "--max_completion_length", "14", "--drop_unsolved"])
    assert "rolled out 40 of 40 prompts" in capsys.readouterr().out
    rates = [rate for line in (output / "pass_rates.jsonl").read_text().splitlines()[1:] for rate in json.loads(line)]
    assert len(rates) == 40
    assert 0 < len([rate for rate in rates if rate in (0, 1)]) < 40
    kept = load_data(DataArguments(dataset_name=str(output)), DatasetMixtureConfig())
    assert list(kept["test"]["pass_rate"]) == [rate for rate in rates if 0 < rate < 1]
    assert len(kept["train"]) == 256


def test_made_pairs_are_the_next_data_set(task, capsys):
    """Sampled for some of the prompts; a second start samples nothing anew."""
    argv = [*quickstart.arguments("pairs", task, "sft", "made_pairs"), "--reward_funcs", REWARDS[1]]
    argv += ["--max_prompts", "24", "--num_generations", "4", "--per_device_train_batch_size", "32"]
    for strategy in ("best_worst", "margin"):
        quickstart.start("make_pairs", [*argv, "--truncated", "keep", "--strategy", strategy])
        report = json.loads((task / "made_pairs" / "report.json").read_text())
        pairs = load_data(DataArguments(dataset_name=str(task / "made_pairs")), DatasetMixtureConfig())["train"]
        assert (report["prompts"], report["completions"], report["pairs"]) == (24, 96, len(pairs))
        assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)
    said = capsys.readouterr().out
    assert said.count("sampled for 8 of 24 prompts") == 1
    assert f"Saved to {task / 'made_pairs'}." in said


@pytest.fixture(scope="module")
def hybrid(task) -> tuple[DPOThenPPO, Path]:
    """All stages, small; pairs judged by what a model this untrained differs in."""
    argv = [
        *quickstart.arguments("hybrid", task, "sft", "hybrid"),
        *("--reward_funcs", REWARDS[1], "--max_steps", "4", "--per_device_train_batch_size", "16"),
        *("--held_out_prompts", "16", "--held_out_samples", "2", "--held_out_every", "2", "--save_steps", "2"),
        *("--pairs", '{"prompts": 96, "num_generations": 4, "truncated": "keep"}'),
        *("--dpo", '{"max_steps": 2, "per_device_train_batch_size": 16, "logging_steps": 1}'),
        *("--expect", '{"dpo/rewards/accuracies": {"2": [0, 1]}, "ppo/held_out/kl": {"0": [-9, 9], "4": [8, 9]}}'),
    ]
    return train_dpo_then_ppo(argv), task / "hybrid"


def test_all_stages_from_one_command(hybrid):
    run, folder = hybrid
    summary = json.loads((folder / "summary.json").read_text())
    assert [(stage["name"], stage["steps"]) for stage in summary["stages"]] == [("sft", 0), ("dpo", 2), ("ppo", 4)]
    for stage in summary["stages"]:
        assert stage["low"] <= stage["first_token_even"] <= stage["high"]
        assert stage["intervals"]["first_token_even"] == [stage["low"], stage["high"]]
        assert (stage["prompts"], stage["samples"]) == (16, 32)
    sampled = json.loads((folder / "round_1/pairs/report.json").read_text())["generated_tokens"]
    assert summary["stages"][1]["generated_tokens"] == sampled
    assert summary["generated_tokens"] == sum(stage["generated_tokens"] for stage in summary["stages"])
    assert run.stages[-1].measured["first_token_even"].mean == pytest.approx(
        summary["stages"][-1]["first_token_even"], abs=1e-4
    )
    accuracy, after_dpo, after_ppo = summary["expected"]
    assert (accuracy["metric"], accuracy["at"], accuracy["holds"]) == ("dpo/rewards/accuracies", 2, True)
    for band, stage, holds in ((after_dpo, 1, True), (after_ppo, 2, False)):
        assert band["value"] == pytest.approx(summary["stages"][stage]["kl"], abs=1e-3) and band["holds"] == holds
    assert "by cross-fitting in 5 folds" in (folder / "round_1/pairs/cleaning.txt").read_text()
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "](stages.png)" in card and "max_steps: 200" in card
    rows = [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("|")]
    assert rows[:5] == ["stage", "---", "sft", "dpo", "ppo"]  # other tables come after
    assert (folder / "stages.png").stat().st_size > 10_000


def test_what_all_stages_leave_is_an_adapter_of_the_start(hybrid, task):
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(task / "sft"), hybrid[1])
    assert trl_ext.load_critic(hybrid[1] / "critic", policy) is not None


@pytest.fixture(scope="module")
def given_pairs(task) -> Path:
    """Of the task, with what made them: prompts to train on, pairs, and held-out pairs."""
    data = load_from_disk(str(task / "data"))
    pairs = data["pairs"].select(range(64))
    pairs = pairs.add_column("digits", [len(row["prompt"]) for row in pairs])
    splits = {"train": data["train"], "test": data["test"], "pairs": pairs, "held": pairs.select(range(16))}
    DatasetDict(splits).save_to_disk(str(task / "given"))
    return task / "given"


def test_given_pairs_in_an_order_and_what_dpo_learned_from_them(task, given_pairs):
    argv = [
        *quickstart.arguments("hybrid", task, "sft", "given_pairs"),
        *("--dataset_name", str(given_pairs), "--reward_funcs", "implicit_reward", REWARDS[1], "--clean", "none"),
        *("--reward_weights", "1.0", "0.5", "--held_out_prompts", "0", "--save_steps", "2"),
        *("--pairs", '{"split": "pairs", "eval_split": "held"}', "--max_steps", "2"),
        "--dpo",
        '{"max_steps": 2, "per_device_train_batch_size": 16, "eval_strategy": "steps", "eval_steps": 1, '
        '"curriculum": "easy_to_hard", "curriculum_column": "digits"}',
        *("--per_device_train_batch_size", "16"),
    ]
    run = train_dpo_then_ppo(argv)
    assert [stage.name for stage in run.stages] == ["pairs", "dpo", "ppo"]
    dpo, ppo = run.stages[1].log_history, run.stages[2].log_history
    assert len([entry for entry in dpo if "eval_rewards/accuracies" in entry]) == 2
    assert "rewards/implicit_reward/mean" in ppo[0] and "rewards/first_token_even/mean" in ppo[0]
    assert not (task / "given_pairs/round_1/pairs/cleaning.txt").exists()
    assert run.dpo_kwargs["curriculum"].column == "digits"


def test_the_second_method_is_looked_up(task):
    with pytest.raises(ValueError, match=r"--method is 'TRPO'\. Choose one of PPO, GRPO"):
        train_dpo_then_ppo([*quickstart.arguments("hybrid", task, "sft", "other"), "--method", "TRPO"])
    with pytest.raises(ValueError, match=r"--dpo is '\{beta: 1\}', which is no JSON"):
        train_dpo_then_ppo([*quickstart.arguments("hybrid", task, "sft", "other"), "--dpo", "{beta: 1}"])
    with pytest.raises(ValueError, match="--dpo has betas, which DPOConfig doesn't know"):
        train_dpo_then_ppo([*quickstart.arguments("hybrid", task, "sft", "other"), "--dpo", '{"betas": 1}'])


def test_a_column_without_a_curriculum(task):
    column = ["--dpo", '{"curriculum_column": "digits"}']
    with pytest.raises(ValueError, match="curriculum_column is set, but curriculum isn't"):
        train_dpo_then_ppo([*quickstart.arguments("hybrid", task, "sft", "other"), *column])


def test_a_push_that_cannot_be_fails_before_the_training(task):
    with pytest.raises(UserError, match=r"--push_to_hub to 'pushed' can't be: .*offline mode is enabled"):
        train_dpo_then_ppo([*quickstart.arguments("hybrid", task, "sft", "pushed"), "--push_to_hub", "true"])
    assert not (task / "pushed" / "start").exists()


def test_a_curriculum_and_health_checks_by_name(task):
    """The arguments of every recipe that samples; the checks are in the log."""
    argv = policy(task, "in_order", "--health_checks", "true", "--curriculum", "frontier", "--held_out_prompts", "0")
    trainer = train_policy(trl_ext.GRPOTrainer, trl_ext.GRPOConfig, argv)
    assert trainer.chooser.schedule == "frontier"
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"curriculum/difficulty", "health/entropy"} <= logged
