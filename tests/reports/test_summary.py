"""summary.json: every number is the run's."""

import json
import math
import os

import pytest
import tiny

from trl_ext import DAPOTrainer, GSPOTrainer
from trl_ext.evaluation.held_out import Estimate, HeldOut
from trl_ext.evaluation.pairs import read_pair_accuracy
from trl_ext.reports.summary import summarize, write_summary


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = tiny.trainer(DAPOTrainer, tmp_path_factory.mktemp("run"), max_steps=3)
    held_out = HeldOut(trainer, list(tiny.prompts(12)), num_samples=4)
    trainer.add_callback(held_out)
    trainer.train()
    return trainer, held_out


@pytest.mark.train
def test_results_are_those_measured(run):
    trainer, held_out = run
    summary = summarize(trainer, held_out.measured, seconds=12.34, model="m", dataset="d", command="c")
    before, after = held_out.before["first_token_even"], held_out.after["first_token_even"]
    assert summary["before"]["first_token_even"] == pytest.approx(before.mean, abs=5e-5)
    assert summary["after"]["first_token_even"] == pytest.approx(after.mean, abs=5e-5)
    assert summary["after"]["intervals"]["first_token_even"] == pytest.approx([after.low, after.high], abs=5e-5)
    assert summary["gain"]["first_token_even"] == pytest.approx(after.mean - before.mean, abs=1e-4)
    assert (summary["before"]["step"], summary["after"]["step"]) == (0, 3)
    assert (summary["after"]["prompts"], summary["after"]["samples"]) == (12, 48)


@pytest.mark.train
def test_costs_are_those_counted(run):
    trainer, held_out = run
    summary = summarize(trainer, held_out.measured, seconds=12.34)
    last = [entry for entry in trainer.state.log_history if "selection/generated_tokens" in entry][-1]
    assert summary["method"] == "DAPO"
    assert summarize(trainer, {}, 0, command="run --hub_token hf_x")["command"] == "run --hub_token ***"
    assert summary["seconds"] == 12.3
    assert summary["steps"] == 3
    assert summary["generated_tokens"] == last["selection/generated_tokens"]
    assert summary["trained_tokens"] == last["selection/trained_tokens"]
    assert summary["generation_rounds"] == last["selection/generation_rounds"] > 3
    assert summary["compute_saved"] == pytest.approx(trainer.saved_compute.share, abs=5e-5)
    assert summary["parameters"] == sum(p.numel() for p in tiny.qwen2().parameters())
    machine = summary["machine"]
    assert (machine["device"], machine["processes"], machine["cpus"]) == ("cpu", 1, os.cpu_count())
    assert {"python", "trl", "torch", "transformers"} <= set(summary["versions"])


@pytest.mark.train
def test_the_gain_is_paired(run):
    # All of 3 prompts gain exactly 0.25: no spread, whatever the prompts' own difficulty is
    measured = {
        0: {"r": Estimate(0.5, 0.0, 1.0, 3, 12, (0.25, 0.5, 0.75))},
        9: {"r": Estimate(0.75, 0.25, 1.0, 3, 12, (0.5, 0.75, 1.0))},
    }
    summary = summarize(run[0], measured, seconds=1)
    assert summary["gain"]["r"] == 0.25
    assert summary["gain"]["intervals"]["r"] == [0.25, 0.25]


def test_without_evaluation_there_are_no_results(tmp_path):
    trainer = tiny.trainer(GSPOTrainer, tmp_path)
    summary = summarize(trainer, {}, seconds=0)
    assert (summary["method"], summary["before"], summary["after"], summary["gain"]) == ("GSPO", None, None, None)


@pytest.mark.train
def test_a_critic_is_judged_by_the_last_tenth_of_the_log(run):
    # 20 logs: the last two count. The KL was logged once, which then is its last tenth; NaN says nothing
    trainer, _ = run
    logged = [{"step": i, "val/explained_variance": i / 100, "loss/value_avg": 1.0} for i in range(20)]
    logged += [{"step": 20, "objective/kl": 1.5}, {"step": 21, "val/explained_variance": math.nan}]
    logged += [{"step": 22, "val/explained_variance": None}]  # as TRL logs NaN
    before, trainer.state.log_history = trainer.state.log_history, logged
    try:
        assert summarize(trainer, {}, 0)["critic"] == {"value_loss": 1.0, "explained_variance": 0.185, "kl": 1.5}
    finally:
        trainer.state.log_history = before
    assert summarize(trainer, {}, 0)["critic"] is None


@pytest.mark.train
def test_a_prediction_is_judged_at_the_end(run, monkeypatch):
    trainer, _ = run
    assert summarize(trainer, {}, 0)["prediction"] is None
    logged = [
        {"step": 1, "selection/calibration_error": 0.3, "compute/prediction_tokens": 100.0},
        {"step": 2, "selection/calibration_error": 0.2, "compute/prediction_tokens": 150.0},
        {"train_runtime": 1.0, "selection/calibration_error": 0.12345},
    ]
    monkeypatch.setattr(trainer.state, "log_history", logged)
    assert summarize(trainer, {}, 0)["prediction"] == {"calibration_error": 0.1235, "tokens": 150}


@pytest.mark.train
def test_a_reward_models_own_results_are_taken_over(run, tmp_path):
    trainer, _ = run
    assert summarize(trainer, {}, 0)["reward_model"] is None
    assert summarize(trainer, {}, 0, reward_model="org/model")["reward_model"] == {"model": "org/model"}
    log = [{"step": step, "eval_accuracy": accuracy} for step, accuracy in ((0, 0.5), (9, 0.875))]
    measured = read_pair_accuracy(log, pairs=40)
    write_summary(summarize(trainer, measured, 0), tmp_path / "summary.json")
    taken = summarize(trainer, {}, 0, reward_model=str(tmp_path))["reward_model"]
    assert (taken["pair_accuracy"], taken["prompts"], taken["step"]) == (0.875, 40, 9)
    assert (taken["before"]["pair_accuracy"], taken["before"]["step"]) == (0.5, 0)
    low, high = taken["intervals"]["pair_accuracy"]
    assert 0.7 < low < 0.875 < high <= 1


@pytest.mark.train
def test_it_is_read_back_as_written(run, tmp_path):
    trainer, held_out = run
    summary = summarize(trainer, held_out.measured, seconds=1, dataset="données")
    write_summary(summary, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    assert not any(isinstance(value, float) and math.isnan(value) for value in summary["after"].values())
