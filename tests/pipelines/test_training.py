"""When a stage ends, and how it is continued after it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from pipelines.dpo_then_ppo_worker import dpo_args, pairs, policy_settings
from pipelines.runs import adapter, same, short
from transformers import TrainerCallback

from trl_ext import PPOConfig
from trl_ext.pipelines.training import StageStoppedError, StaysAbove


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
