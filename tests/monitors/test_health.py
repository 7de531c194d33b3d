"""Health checks: fed logs by hand, and on real runs of trainers of ours and of TRL's."""

import itertools
import random
from typing import Any

import pytest
import tiny
import torch
import trl
from datasets import Dataset
from monitors.handwritten import Run
from transformers import TrainerControl

from trl_ext import GRPOTrainer, PPOTrainer
from trl_ext.evaluation.held_out import HeldOut
from trl_ext.monitors import health
from trl_ext.monitors.health import (
    EntropyCheck,
    ExplainedVarianceCheck,
    HealthChecks,
    KLCheck,
    LengthCheck,
    PreferenceAccuracyCheck,
    RewardHackingCheck,
    theil_sen_slope,
    trend_p_value,
)
from trl_ext.monitors.health_check import HealthCheck


# Each check


@pytest.mark.parametrize(
    ("logs", "per_sequence", "per_token"),
    [
        ({"objective/kl": 1.5, "completions/mean_length": 30.0}, 1.5, 0.05),
        ({"kl": 0.05, "completions/mean_length": 30.0}, 1.5, 0.05),
        ({"objective/kl": 1.5, "kl": 9.0, "completions/mean_length": 30.0}, 1.5, 0.05),  # PPO with `beta`, too
        ({"objective/kl": 1.5}, 1.5, None),
        ({"kl": 0.05}, None, 0.05),
        ({"kl": None, "completions/mean_length": 30.0}, None, None),
        ({"eval_kl": 0.05}, None, None),
    ],
)
def test_kl_is_read_per_sequence_or_per_token(logs, per_sequence, per_token):
    assert KLCheck().read(logs) == pytest.approx(per_sequence)
    assert KLCheck(per="token").read(logs) == pytest.approx(per_token)


def test_kl_has_a_band_whose_lower_end_comes_later():
    def alarms(value: float, step: int) -> int:
        check = KLCheck(patience=1)
        Run(check, history=[{}] * (step - 1)).series("objective/kl", value)
        return len(check.alarms)

    # grace: a quarter of 100 steps
    assert [alarms(value, 10) for value in (0.0, 0.49, 1.0, 2.0, 2.01)] == [0, 0, 0, 0, 1]
    assert [alarms(value, 30) for value in (0.0, 0.49, 0.5, 2.0, 2.01)] == [1, 1, 0, 0, 1]


def test_kl_says_which_side_and_unit():
    run = Run(KLCheck(patience=1)).series("objective/kl", 5.3)
    assert (
        "KL to the reference is 5.3 nats per completion, above its band of 0.5 to 2." in run.callback.alarms[0].message
    )
    run = Run(KLCheck((0.01, 0.1), "token", patience=1, grace=0.0)).series("kl", 0.001)
    assert "0.001 nats per token, below its band of 0.01 to 0.1." in run.callback.alarms[0].message


@pytest.mark.parametrize("key", ["rewards/accuracies", "accuracy", "eval_rewards/accuracies", "eval_accuracy"])
def test_preference_accuracy_must_lie_above(key):
    run = Run(PreferenceAccuracyCheck(patience=1, grace=0)).series(key, 0.76, 0.75)
    assert [alarm.step for alarm in run.callback.alarms] == [2]
    assert f"preference accuracy ({key}) is 0.750, not above 0.75" in run.callback.alarms[0].message


def test_preferences_are_judged_by_evaluation_once_there_is_one():
    check = PreferenceAccuracyCheck(patience=2, grace=0)
    train, held_out = "rewards/accuracies", "eval_rewards/accuracies"
    run = Run(check).log({train: 0.5}, {held_out: 0.9}, {train: 0.5}, {train: 0.5}, {train: 0.5}, {held_out: 0.9})
    assert not check.alarms
    assert check.healthy_logs == 2
    assert run.log({held_out: 0.6}, {train: 0.9}, {held_out: 0.6}).callback.alarms


def test_of_evaluation_sets_with_names_the_first_is_judged():
    check = PreferenceAccuracyCheck(patience=1, grace=0)
    maths, code = ({f"eval_{name}_loss": 1.0, f"eval_{name}_rewards/accuracies": 0.9} for name in ("maths", "code"))
    # Which isn't about preferences
    maths["eval_maths_mean_token_accuracy"] = 0.1
    run = Run(check).log({"rewards/accuracies": 0.9}, maths, code, {"rewards/accuracies": 0.5})
    run.log(maths, code | {"eval_code_rewards/accuracies": 0.5})
    assert check.key == "eval_maths_rewards/accuracies"
    assert not check.alarms
    assert run.log(maths | {check.key: 0.5}).callback.alarms


def test_a_key_of_ones_own():
    run = Run(PreferenceAccuracyCheck(metric="eval_math_accuracy", patience=1, grace=0))
    run.series("accuracy", 0.1)
    assert not run.callback.alarms
    assert run.series("eval_math_accuracy", 0.1).callback.alarms


def test_entropy_is_measured_by_its_start():
    # Mean of the first three: 2. A fifth of it: 0.4
    run = Run(EntropyCheck(patience=2)).series("entropy", 1, 2, 3, 0.41, 0.4, 0.41, 0.4)
    assert not run.callback.alarms
    run.series("entropy", 0.39)
    assert "entropy is 0.39 nats per token, 20% of the 2 that it started with" in run.callback.alarms[0].message
    assert run.logged("health/entropy")[-1] == 0.39


def test_the_start_survives_a_resume():
    first = Run(EntropyCheck(patience=1)).series("entropy", 1, 2, 3, 2)
    resumed = Run(EntropyCheck(patience=1), history=first.state.log_history).series("entropy", 0.41, 0.4)
    assert [alarm.step for alarm in resumed.callback.alarms] == [6]


@pytest.mark.parametrize(
    ("length", "told"),
    [(20, False), (10, False), (9, "9 tokens, less than 0.5 times"), (40, False), (41, "more than 2")],
)
def test_length_drifts_both_ways(length, told):
    run = Run(LengthCheck(patience=1)).series("completions/mean_length", 19, 20, 21, length)
    assert bool(run.callback.alarms) == bool(told)
    assert not told or told in run.callback.alarms[0].message


def test_completions_that_a_curriculum_lets_grow_are_measured_by_their_limit():
    run = Run(LengthCheck(patience=1))
    for limit in range(64, 1024, 64):
        run.log({"curriculum/completion_length": limit, "completions/mean_length": 0.4 * limit})
    assert not run.callback.alarms
    run.log({"curriculum/completion_length": 1024, "completions/mean_length": 0.9 * 1024})
    message = "completions have 90% of their limit, more than 2 times the 40% of the start"
    assert message in run.callback.alarms[0].message


def test_a_limit_holds_until_there_is_a_different_one():
    run = Run(LengthCheck(patience=1))
    for limit in (64, 128, 256):
        run.log({"curriculum/completion_length": limit}, {"completions/mean_length": 0.4 * limit})
    assert run.callback.start == pytest.approx(0.4)
    run.log({"completions/mean_length": 0.7 * 256})
    assert not run.callback.alarms
    run.log({"completions/mean_length": 0.9 * 256})
    assert "completions have 90% of their limit" in run.callback.alarms[0].message


def test_the_held_out_metric_is_the_same_after_a_resume():
    """A state that was saved has its keys sorted: the first one logged may not be the first one read."""
    names = ("held_out/strict", "held_out/accuracy")
    run = Run(RewardHackingCheck())
    run.log({"reward": 1.0}, {key: 0.5 for name in names for key in (name, f"{name}/low")})
    again = Run(RewardHackingCheck(), history=[dict(sorted(entry.items())) for entry in run.state.log_history])
    assert run.callback.key == again.callback.key == "held_out/accuracy"


# Reward hacking


def test_trends_by_hand():
    # Of the 3! orders of three values, one rises throughout
    assert trend_p_value([1, 2, 3], rising=True) == pytest.approx(1 / 6)
    assert trend_p_value([1, 2, 3], rising=False) == pytest.approx(1)
    # Of the 4! = 24 orders of four, one rises throughout, and three have one neighbouring pair exchanged
    assert trend_p_value([1, 2, 4, 3], rising=True) == pytest.approx(4 / 24)
    assert trend_p_value([5, 5, 5, 5], rising=True) == 1


def test_every_order_has_its_share():
    orders = [trend_p_value(order, rising=False) for order in itertools.permutations(range(5))]
    for level in {round(value, 9) for value in orders}:
        assert sum(value <= level + 1e-9 for value in orders) / 120 == pytest.approx(level)


def test_the_slope_of_theil_and_sen():
    # Slopes of 0, 1, 2, 30: 1, 1, 28, 1, 14.5, 10: median (1 + 10) / 2
    assert theil_sen_slope([0, 1, 2, 30]) == pytest.approx(5.5)
    assert theil_sen_slope([4, 3, 2, 1]) == -1


def feed(run: Run, metrics: list[float], rewards: list[float], key: str = "held_out/exact_match") -> Run:
    """Two logs of training before each measurement."""
    for metric, reward in zip(metrics, rewards, strict=True):
        run.log({"reward": reward - 0.01}, {"reward": reward + 0.01})
        run.log({key: metric, f"{key}/low": metric - 0.1, f"{key}/high": metric + 0.1})
    return run


UP, DOWN = [0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.55, 0.6], [0.8, 0.78, 0.75, 0.7, 0.69, 0.6, 0.58, 0.5]


def test_reward_up_and_truth_down_is_told():
    check = RewardHackingCheck()
    run = feed(Run(check), DOWN, UP)
    # The sixth measurement fills the window, the seventh is the second in a row: log 21
    assert [alarm.step for alarm in check.alarms] == [21]
    assert "reward went from 0.2 to 0.55 (p = 0.0014) while held_out/exact_match went from 0.78 to 0.58" in (
        check.alarms[0].message
    )
    # Of the first six: slopes between all pairs, their median times five
    assert run.logged("health/reward_hacking")[17] == pytest.approx(-5 * theil_sen_slope(DOWN[:6]))
    assert run.logged("health/reward_hacking")[17] > 0


@pytest.mark.parametrize(
    ("metrics", "rewards"),
    [(UP, UP), (DOWN, DOWN), (UP, DOWN), ([0.5] * 8, UP), (DOWN, [0.5] * 8), ([d / 100 for d in DOWN], UP)],
    ids=["both up", "both down", "reverse", "flat truth", "flat reward", "a fall too small to matter"],
)
def test_anything_else_is_not(metrics, rewards):
    check = RewardHackingCheck()
    feed(Run(check), metrics, rewards)
    assert not check.alarms


def test_noise_is_no_trend():
    rng, told = random.Random(1), 0
    for _ in range(60):
        check = RewardHackingCheck()
        feed(Run(check), [rng.gauss(0.6, 0.1) for _ in range(30)], [float(i) for i in range(30)])
        told += bool(check.alarms)
    assert told <= 6


def test_a_slow_fall_under_noise_is_found():
    rng, told = random.Random(2), 0
    for _ in range(20):
        check = RewardHackingCheck(window=12)
        falling = [0.8 - 0.01 * i + rng.gauss(0, 0.03) for i in range(30)]
        feed(Run(check), falling, [i + rng.gauss(0, 2) for i in range(30)])
        told += bool(check.alarms)
    assert told >= 18


def test_a_measurement_before_training_has_no_reward():
    check = RewardHackingCheck(patience=1)
    run = Run(check).log({"held_out/x": 0.9, "held_out/x/low": 0.8})
    feed(run, DOWN[:5], UP[:5], "held_out/x")
    assert not check.alarms  # five measurements
    feed(run, DOWN[5:6], UP[5:6], "held_out/x")
    assert len(check.alarms) == 1


def test_a_named_metric():
    check = RewardHackingCheck(metric="eval_accuracy", reward="rewards/style/mean", patience=1)
    run = Run(check)
    for metric, reward in zip(DOWN, UP, strict=True):
        run.log({"rewards/style/mean": reward, "reward": 0.0}, {"held_out/other": 1.0, "held_out/other/low": 0.9})
        run.log({"eval_accuracy": metric})
    assert len(check.alarms) == 1


# Settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KLCheck(patience=0), "patience=0 must be a whole number, 1 or more"),
        (lambda: KLCheck(patience=1.5), "patience=1.5 must be"),
        (lambda: KLCheck(grace=1.0), "grace=1.0 is a share of the run"),
        (lambda: KLCheck(band=(2.0, 0.5)), r"band=\(2.0, 0.5\) must be two numbers, the lower one first"),
        (lambda: KLCheck(per="word"), "per='word' is unknown. Choose one of 'sequence', 'token'"),
        (lambda: PreferenceAccuracyCheck(75), "threshold=75 is a share of pairs"),
        (lambda: EntropyCheck(floor=0.0), "floor=0.0 is a share of the first entropy"),
        (lambda: EntropyCheck(start_logs=0), "start_logs=0 must be"),
        (lambda: LengthCheck(band=(-1.0, 2.0)), "none negative"),
        (lambda: ExplainedVarianceCheck(1.0), "threshold=1.0 must be less than 1"),
        (lambda: RewardHackingCheck(window=2), "window=2 must be a whole number, 3 or more"),
        (
            lambda: RewardHackingCheck(window=4),
            "window=4 measurements has a p-value of 0.042 at least.*Widen the window",
        ),
        (lambda: RewardHackingCheck(p_value=1.0), "p_value=1.0 must be in"),
        (lambda: RewardHackingCheck(min_fall=-0.1), "min_fall=-0.1 must not be negative"),
        (lambda: HealthChecks(without=["lenght"]), "there is no check 'lenght', only kl, preference_accuracy"),
        (lambda: HealthChecks(RewardHackingCheck("held_out/a"), RewardHackingCheck("held_out/b")), "given twice"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_is_no_check_is_refused():
    with pytest.raises(TypeError, match=r"is no HealthCheck. Pass checks such as KLCheck"):
        HealthChecks("kl")  # type: ignore[arg-type]


def test_all_of_them():
    checks = HealthChecks(KLCheck(band=(0.0, 9.0)), stop=True, without="length")
    assert list(checks.checks) == ["kl", "preference_accuracy", "entropy", "reward_hacking", "explained_variance"]
    assert checks.checks["kl"].band == (0.0, 9.0)
    assert [check.stop for check in checks.checks.values()] == [False, True, True, True, True]


class LossCheck(HealthCheck):
    """A check as somebody adds one: a class, and an entry in the table."""

    name = "loss"
    advice = "Try a lower learning rate."

    def read(self, logs):
        return logs.get("loss")

    def complaint(self, value, early):
        return f"the loss is {value}" if value > 1 else None


def test_a_new_check_is_one_class_and_one_entry(monkeypatch, caplog):
    monkeypatch.setattr(health, "CHECKS", (*health.CHECKS, LossCheck))
    checks = HealthChecks(stop=True)
    assert list(checks.checks)[-1] == "loss" and checks.checks["loss"].stop
    run = Run(checks).series("loss", *[2.0] * 5)
    assert [alarm.check for alarm in checks.alarms] == ["loss"]
    assert caplog.messages[0].startswith(
        "Health check `loss` at step 5: the loss is 2.0, 5 logs in a row. Try a lower"
    )
    assert run.logged("health/loss_alarm") == [0, 0, 0, 0, 1] and run.flags == (True, True)
    assert "loss" not in HealthChecks(without=["loss"]).checks


def test_a_table_of_checks_has_each_name_once():
    names = [check.name for check in health.CHECKS]
    assert len(names) == len(set(names)) == 6


@pytest.mark.parametrize("missing", ["name", "advice"])
def test_a_check_that_lacks_a_part_is_an_error(missing):
    half = type("Half", (LossCheck,), {missing: None})
    with pytest.raises(TypeError, match=f"Half has no `{missing}`"):
        half()


# Real runs


class Always(HealthCheck):
    """Unwell whenever there is a loss."""

    name = "always"
    advice = "Try nothing."

    def read(self, logs):
        return logs.get("loss")

    def complaint(self, value, early):
        return "there is a loss"


def saved(directory: Any) -> str:
    """A tiny model in a directory, from which trainers load their reference again."""
    tiny.stopping().save_pretrained(directory / "model")
    return str(directory / "model")


class Tracker(HealthCheck):
    """Sees logs as a tracker does: in the order of callbacks."""

    name = "tracker"
    advice = ""

    def read(self, logs):
        self.seen = [*getattr(self, "seen", []), dict(logs)]
        return None

    def complaint(self, value, early):
        return None


@pytest.mark.train
def test_a_stopped_run_leaves_a_checkpoint_from_which_it_goes_on(tmp_path):
    def build(*callbacks: Any, **settings: Any) -> Any:
        trainer = tiny.trainer(GRPOTrainer, tmp_path, max_steps=5, **settings)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    whole = tiny.trainer(GRPOTrainer, tmp_path / "whole", max_steps=5)
    whole.train()
    stopped = build(Always(patience=3, stop=True))  # save_strategy="no"
    stopped.train()
    assert stopped.state.global_step == 3
    assert (tmp_path / "checkpoint-3").is_dir()
    resumed = build(Always(patience=3, stop=True))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 5
    for name, weight in tiny.weights(whole.model).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.train
def test_checks_change_nothing_and_trackers_see_them(tmp_path):
    def build(name: str) -> Any:
        arguments = {"model": saved(tmp_path)}
        settings = {"max_steps": 3, "num_generations": 1, "num_iterations": 1}
        return tiny.trainer(PPOTrainer, tmp_path / name, arguments=arguments, **settings)

    plain = build("plain")
    plain.train()
    watched = build("watched")
    tracker = Tracker()
    watched.add_callback(tracker)
    checks = HealthChecks().add_to(watched)
    watched.add_callback(HeldOut(watched, list(tiny.prompts(4)), num_samples=2, batch_size=4, every=1))
    watched.train()
    ours = [{k: v for k, v in entry.items() if not k.startswith("health/")} for entry in tiny.history(watched)]
    assert ours == tiny.history(plain)
    found = tiny.history(watched)[-1]
    assert found["health/kl"] == found["objective/kl"]
    assert found["health/entropy"] == found["entropy"]
    assert found["health/length"] == found["completions/mean_length"]
    assert found["health/explained_variance"] == found["val/explained_variance"]
    assert any("health/kl" in logs for logs in tracker.seen)
    hacking = checks.checks["reward_hacking"]
    assert hacking.key == "held_out/first_token_even"
    assert len(hacking._points) == 2  # after steps 2 and 3; before step 1 is logged there is no reward


@pytest.mark.train
def test_trls_grpo_logs_kl_by_token(tmp_path):
    config = trl.GRPOConfig(**tiny.cpu_settings(tmp_path, beta=0.1, max_steps=2))
    trainer = trl.GRPOTrainer(
        model=saved(tmp_path),
        reward_funcs=tiny.hashed,
        args=config,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    HealthChecks().add_to(trainer)
    trainer.train()
    log = tiny.history(trainer)[-1]
    assert log["health/kl"] == pytest.approx(log["kl"] * log["completions/mean_length"])
    assert log["kl"] > 0


@pytest.mark.train
def test_trls_dpo_and_reward_trainers_log_preference_accuracy(tmp_path):
    rows = {
        "prompt": ["w1 w2"] * 8,
        "chosen": [f"w{i} w4" for i in range(8)],
        "rejected": [f"w{i} w5" for i in range(8)],
    }
    data, common = Dataset.from_dict(rows), {"processing_class": tiny.tokenizer()}
    settings = {
        key: value
        for key, value in tiny.cpu_settings(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1).items()
        if key not in ("num_generations", "max_completion_length")
    }
    dpo = trl.DPOTrainer(
        model=saved(tmp_path), args=trl.DPOConfig(**settings), train_dataset=data, eval_dataset=data, **common
    )
    checks = HealthChecks().add_to(dpo)
    dpo.train()
    assert checks.checks["preference_accuracy"].key == "eval_rewards/accuracies"
    evaluations = [entry for entry in dpo.state.log_history if "eval_loss" in entry]
    assert [e["health/preference_accuracy"] for e in evaluations] == [
        e["eval_rewards/accuracies"] for e in evaluations
    ]
    assert len(evaluations) == 2


@pytest.mark.train
def test_a_run_that_hacks_its_reward_is_stopped_by_its_held_out_metric(tmp_path):
    """The measurement is logged with a control of its own: the stop must reach the trainer's."""
    trainer = tiny.trainer(GRPOTrainer, tmp_path, max_steps=12)
    rewards, truths = iter(range(1, 100)), iter(range(100, 0, -1))

    class Falling(HeldOut):
        def measure(self, state):
            truth = next(truths) / 100
            logs = {"held_out/truth": truth, "held_out/truth/low": truth}
            state.log_history.append({**logs, "step": state.global_step})
            self.trainer.callback_handler.on_log(self.trainer.args, state, TrainerControl(), dict(logs))

    trainer.reward_funcs[0].func = lambda completion_ids, **_: [next(rewards) / 1.0] * len(completion_ids)
    HealthChecks(RewardHackingCheck(stop=True)).add_to(trainer)
    trainer.add_callback(Falling(trainer, [], every=1))
    trainer.train()
    # Measurements from step 2 on have a reward; the seventh is at step 8
    assert trainer.state.global_step == 8
    assert (tmp_path / "checkpoint-8").is_dir()
