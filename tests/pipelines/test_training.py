"""When a stage ends, and how it is continued after it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from pipelines.dpo_then_ppo_worker import dpo_args, pairs, policy_settings, prompts
from pipelines.runs import adapter, same, short
from transformers import TrainerCallback

from trl_ext import PPOConfig
from trl_ext.evaluation.held_out import read_estimates
from trl_ext.pipelines.training import StageStoppedError, StaysAbove, StopsRising, copy_model


@pytest.mark.train
def test_above_the_threshold_for_so_many_logs(tmp_path: Path) -> None:
    run = short(tmp_path, dpo_args=dpo_args(max_steps=30, learning_rate=5e-2), accuracy_logs=4)
    run.train()
    accuracies = [e["rewards/accuracies"] for e in run.stages[1].log_history if "rewards/accuracies" in e]
    assert run.stages[1].steps == len(accuracies) < 30
    assert min(accuracies[-4:]) > 0.75
    # Not a log later than it could
    assert not any(min(accuracies[i : i + 4]) > 0.75 for i in range(len(accuracies) - 4))


@pytest.mark.train
def test_held_out_pairs_decide_where_there_are_some(tmp_path: Path) -> None:
    args = dpo_args(max_steps=30, learning_rate=5e-2, eval_strategy="steps", eval_steps=3)
    run = short(tmp_path, dpo_args=args, eval_pairs=pairs(8), accuracy_logs=2)
    run.train()
    accuracies = [e["eval_rewards/accuracies"] for e in run.stages[1].log_history if "eval_rewards/accuracies" in e]
    assert run.stages[1].steps == 3 * len(accuracies) < 30 and min(accuracies[-2:]) > 0.75


@pytest.mark.train
def test_until_they_are_evaluated_nothing_decides(tmp_path: Path) -> None:
    """Training accuracy is above the threshold at once, and says nothing of held-out pairs."""
    args = dpo_args(max_steps=30, learning_rate=5e-2, eval_strategy="steps", eval_steps=12)
    run = short(tmp_path, dpo_args=args, eval_pairs=pairs(8), accuracy_logs=1)
    run.train()
    assert run.stages[1].steps == 12
    trained = [e["rewards/accuracies"] for e in run.stages[1].log_history if "rewards/accuracies" in e]
    assert max(trained[:10]) > 0.75


@pytest.mark.train
def test_a_rule_without_enough_logs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    short(tmp_path, accuracy_logs=5).train()
    assert "asks for 5 logs of rewards/accuracies, and there were 2" in capsys.readouterr().out


@pytest.mark.train
def test_none_runs_to_the_last_step(tmp_path: Path) -> None:
    run = short(tmp_path, accuracy_threshold=None, accuracy_logs=1, dpo_args=dpo_args(max_steps=5, learning_rate=5e-2))
    run.train()
    assert run.stages[1].steps == 5


@pytest.mark.train
def test_killed_after_the_log_that_ended_it(tmp_path: Path) -> None:
    """The last checkpoint is the stage's end already: not a step more, and the same weights."""
    args = {"dpo_args": dpo_args(max_steps=30, learning_rate=5e-2, save_steps=1), "accuracy_logs": 4}
    run = short(tmp_path, **args)
    run.train()
    steps, result = run.stages[1].steps, adapter(tmp_path)
    # As it was before the stage was called finished
    file = json.loads((tmp_path / "stages.json").read_text())
    file["stages"] = file["stages"][:1]
    (tmp_path / "stages.json").write_text(json.dumps(file))
    again = short(tmp_path, **args)
    again.train()
    assert again.stages[1].steps == steps
    assert same(adapter(tmp_path), result)
    assert again.stages[-1].generated_tokens == run.stages[-1].generated_tokens > 0
    assert not list((tmp_path / "round_1/ppo").glob("optimizer*"))


@pytest.mark.train
@pytest.mark.parametrize("stops", ["dpo", "ppo"])
def test_stopped_by_someone_else(tmp_path: Path, stops: str) -> None:
    """A stage that a callback ends, with a checkpoint, isn't finished; the same call goes on from there."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == 3

    def stop(stage: str, trainer: Any) -> None:
        if stage == stops:
            trainer.add_callback(Stop())

    args = {"dpo_args": dpo_args(), "policy_args": PPOConfig(**policy_settings()), "accuracy_threshold": None}
    run = short(tmp_path, prepare=stop, **args)
    with pytest.raises(StageStoppedError, match=f"{stops} was stopped at step 3 of 6"):
        run.train()
    assert stops not in [stage.name for stage in run.stages]
    again = short(tmp_path, **args)
    again.train()
    assert [stage.steps for stage in again.stages] == [0, 6, 6]
    never = short(tmp_path / "never", **args)
    never.train()
    assert same(adapter(tmp_path), adapter(tmp_path / "never"))


def test_the_rule_reads_the_log_of_a_resumed_run() -> None:
    rule = StaysAbove(0.75, 2)

    class State:
        max_steps = 10
        log_history = [{"rewards/accuracies": a, "step": i} for i, a in enumerate((0.9, 0.7, 0.8, 0.8))]

    assert rule.reached(State()) and rule.reached(State())
    State.log_history = State.log_history[:3]
    assert not rule.reached(State())


MEASURED: dict[str, Any] = {"held_out": prompts(6), "held_out_samples": 2, "dpo_held_out_every": 2}


def measured_dpo(run: Any) -> dict[int, float]:
    """The held-out reward by DPO's step."""
    stage = next(stage for stage in run.stages if stage.name == "dpo")
    return {step: found["low_ids"].mean for step, found in read_estimates(stage.log_history).items()}


@pytest.mark.train
def test_dpo_ends_where_the_held_out_reward_stops_rising(tmp_path: Path) -> None:
    """The pairs prefer even words, and the reward small ones: what DPO learns is soon of no more use."""
    args = dpo_args(max_steps=40, learning_rate=2e-2, save_steps=1, save_total_limit=None)
    run = short(tmp_path, dpo_args=args, **MEASURED, dpo_patience=2)
    run.train()
    found = measured_dpo(run)
    best = max(found, key=lambda step: (found[step], -step))
    assert list(found) == list(range(0, best + 5, 2)) and best + 4 < 40
    # The best adapter goes on, in the stage's folder and in memory
    trained = tmp_path / "round_1/dpo"
    kept = trained / f"checkpoint-{best}" if best else tmp_path / "start"
    assert same(adapter(trained), adapter(kept)) and not same(
        adapter(trained), adapter(trained / f"checkpoint-{best + 4}")
    )
    assert run.stages[-1].measured and run.stages[-2].measured["low_ids"].mean == pytest.approx(found[best])


@pytest.mark.train
def test_measuring_leaves_no_trace(tmp_path: Path) -> None:
    args = {"dpo_args": dpo_args(disable_dropout=False), "accuracy_threshold": None}
    short(tmp_path / "measured", **args, **MEASURED, dpo_patience=9).train()
    short(tmp_path / "not", **args).train()
    last = "round_1/dpo/checkpoint-6"
    assert same(adapter(tmp_path / "measured" / last), adapter(tmp_path / "not" / last))


@pytest.mark.train
def test_a_measured_stage_that_was_stopped(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == 5

    def stop(stage: str, trainer: Any) -> None:
        if stage == "dpo":
            trainer.add_callback(Stop())

    args = {"dpo_args": dpo_args(max_steps=8, learning_rate=1e-2), **MEASURED, "dpo_patience": 9}
    with pytest.raises(StageStoppedError, match="dpo was stopped at step 5 of 8"):
        short(tmp_path / "stopped", prepare=stop, **args).train()
    again, never = short(tmp_path / "stopped", **args), short(tmp_path / "never", **args)
    again.train()
    never.train()
    # One measurement more, where training ended for the time being
    assert {step: mean for step, mean in measured_dpo(again).items() if step != 5} == measured_dpo(never)
    assert same(adapter(tmp_path / "stopped"), adapter(tmp_path / "never"))


def test_the_best_measurement_is_so_many_ago() -> None:
    class State:
        log_history: list[dict[str, Any]] = []

    def log(step: int, mean: float) -> None:
        parts = {f"held_out/r/{part}": 1 for part in ("low", "high", "prompts", "samples")}
        State.log_history.append({"held_out/r": mean, **parts, "step": step})

    rule = StopsRising({"r": 2.0}, 2, Path("best"))
    assert not rule.reached(State())
    for step, (mean, over) in enumerate(
        [(0.5, False), (0.4, False), (0.6, False), (0.6, False), (0.5, True), (0.7, False)]
    ):
        log(step, mean)
        assert rule.reached(State()) is over, step
    assert rule.rewards(State())[0] == 1.0


def test_a_stage_that_is_finished_from_its_last_checkpoint_has_all_roles_in_its_folder(tmp_path: Path) -> None:
    checkpoint, stage = tmp_path / "checkpoint-8", tmp_path / "stage"
    names = ["adapter_model.safetensors", "critic/critic.safetensors", "ref/adapter_model.safetensors"]
    for name in [*names, "optimizer.pt"]:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(name)
    stage.mkdir()
    copy_model(checkpoint, stage)
    assert sorted(str(file.relative_to(stage)) for file in stage.rglob("*") if file.is_file()) == names
