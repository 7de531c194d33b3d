"""Progress lines: what a person reads, word for word."""

import io
import threading
import time

import pytest
import tiny
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_ext import DUPOTrainer
from trl_ext.evaluation.held_out import HeldOut
from trl_ext.monitors import progress
from trl_ext.monitors.progress import ProgressLines, count


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def printed():
    """Feeds logs to the callback: `printed(step, seconds since the last, **logs)` returns the line."""
    clock, stream = Clock(), io.StringIO()
    lines = ProgressLines(stream, clock)
    state = TrainerState(max_steps=60, global_step=0)

    def feed(step: int, seconds: float, logs: dict | None, begin: bool = False) -> str:
        state.global_step = step
        clock.now += seconds
        if begin:
            lines.on_train_begin(None, state, TrainerControl())
            lines.on_train_end(None, state, TrainerControl())  # the thread has another clock
            return ""
        stream.seek(0)
        stream.truncate()
        if logs is None:
            lines.on_step_end(None, state, TrainerControl())
        else:
            lines.on_log(None, state, TrainerControl(), logs=logs)
        return stream.getvalue()

    def waited(seconds: float) -> str:
        clock.now += seconds
        stream.seek(0)
        stream.truncate()
        lines.speak_up(state)
        return stream.getvalue()

    feed.state, feed.waited = state, waited
    feed(0, 0, {}, begin=True)
    return feed


SELECTED = {
    "reward": 0.41234,
    "selection/groups_generated": 58.0,
    "selection/groups_kept": 32.0,
    "selection/groups_duplicated": 0.0,
    "selection/generated_tokens": 131_072.0,
}


def test_a_line_of_reinforcement_learning(printed):
    # 12 steps in 7.2 s: 0.6 s each, 48 to go: 28.8 s
    assert printed(12, 7.2, SELECTED) == (
        "step 12/60 · reward 0.412 · 32 groups kept of 58 · 131k tokens generated · 0.60 s/step · 0:29 left\n"
    )


def test_pace_is_recent_and_time_left_is_of_the_whole_session(printed):
    printed(10, 10, SELECTED)  # 1 s a step
    # then 2 s a step: 10 + 10 s for 15 steps, 45 to go: 60 s
    assert printed(15, 10, {"reward": 0.5}) == "step 15/60 · reward 0.500 · 2.00 s/step · 1:00 left\n"


def test_saved_compute_is_told_where_there_is_some(printed):
    assert "· 61% compute saved ·" in printed(12, 7.2, SELECTED | {"compute/saved": 0.614})
    assert "saved" not in printed(14, 7.2, SELECTED | {"compute/saved": 0.0049})


def test_the_first_step_has_a_line_and_those_after_a_silence(printed):
    assert printed(1, 2, None) == "step  1/60 · 2.00 s/step · 1:58 left\n"
    assert printed(2, 2, None) == ""
    assert printed(3, 28, None) == "step  3/60 · 15.00 s/step · 10:08 left\n"  # 32 s for 3 steps, 57 to go
    printed(40, 1000, {}, begin=True)
    assert printed(41, 1, None).startswith("step 41/60 · 1.00 s/step")  # a resumed run's first


def test_a_step_that_takes_long_is_told_while_it_runs(printed):
    assert printed.waited(29) == ""
    assert printed.waited(1) == "step  1/60 · running for 0:30\n"
    assert printed.waited(29) == ""
    assert printed.waited(2) == "step  1/60 · running for 1:01\n"
    printed(1, 4, {"loss": 1.0})
    printed(1, 0, None)
    assert printed.waited(31) == "step  2/60 · running for 0:31\n"
    printed.state.global_step = 60
    assert printed.waited(31).startswith("step 60/60")  # saving, measuring


def test_the_thread_speaks_and_ends(tmp_path):
    stream, state = io.StringIO(), TrainerState(max_steps=60, global_step=3)
    lines = ProgressLines(stream, silence=0.0)
    lines.on_train_begin(None, state, TrainerControl())
    names = [thread for thread in threading.enumerate() if thread._target is progress._speak_up]
    assert len(names) == 1
    stop = time.monotonic() + 10
    while not stream.getvalue() and time.monotonic() < stop:
        time.sleep(0.05)
    assert stream.getvalue().startswith("step  4/60 · running for 0:0")
    lines.on_train_end(None, state, TrainerControl())
    names[0].join(10)
    assert not names[0].is_alive()


def test_copies_are_told(printed):
    assert "20 groups kept of 32 · 12 duplicated ·" in printed(
        1,
        1,
        {**SELECTED, "selection/groups_generated": 32, "selection/groups_kept": 20, "selection/groups_duplicated": 12},
    )


def test_what_a_critic_is_worth_is_told(printed):
    line = printed(1, 1, {"reward": 0.5, "objective/kl": 1.234, "val/explained_variance": 0.317})
    assert line.startswith("step  1/60 · reward 0.500 · KL 1.23 · explained variance 0.32 · 1.00 s/step")
    # TRL logs NaN as `None`: while all returns are equal, there is nothing to explain
    line = printed(2, 1, {"reward": 0.5, "val/explained_variance": None})
    assert line.startswith("step  2/60 · reward 0.500 · 1.00 s/step")


def test_a_line_of_reward_modelling(printed):
    assert printed(1, 1, {"loss": 0.5, "accuracy": 0.875}).startswith("step  1/60 · loss 0.500 · accuracy 0.875 · ")
    line = printed(2, 1, {"eval_loss": 0.25, "eval_accuracy": 0.9})
    assert line.startswith("step  2/60 · eval loss 0.250 · eval accuracy 0.900 · ")


def test_a_line_of_supervised_training(printed):
    line = printed(1, 1, {"loss": 2.0314, "mean_token_accuracy": 0.4124, "entropy": 2.5})
    assert line == "step  1/60 · loss 2.031 · mean token accuracy 0.412 · 1.00 s/step · 0:59 left\n"


def test_held_out_results_have_their_own_line(printed):
    logs = {"held_out/exact_match": 0.336}
    logs |= {
        f"held_out/exact_match/{k}": v
        for k, v in {"low": 0.304, "high": 0.368, "prompts": 512, "samples": 2048}.items()
    }
    assert printed(0, 1, logs) == (
        "held-out exact_match at step 0: 0.336, 95 % between 0.304 and 0.368 (512 prompts, 2048 samples)\n"
    )


def test_the_end(printed):
    assert printed(60, 1, {"train_runtime": 3725.2, "train_loss": 0.1}) == "trained 60 steps in 1:02:05\n"


def test_a_resumed_session_has_its_own_pace(printed):
    printed(40, 1000, {}, begin=True)
    assert printed(50, 5, {"loss": 1.0}) == "step 50/60 · loss 1.000 · 0.50 s/step · 0:05 left\n"


def test_only_the_main_process_speaks(printed):
    printed.state.is_world_process_zero = False
    assert printed(1, 1, SELECTED) == ""


def test_two_logs_at_one_step(printed):
    printed(5, 5, {"loss": 1.0})
    assert printed(5, 2, {"eval_loss": 0.9}) == "step  5/60 · eval loss 0.900 · 2.00 s/step · 1:17 left\n"


@pytest.mark.parametrize(
    ("number", "written"),
    [(0, "0"), (950, "950"), (1000, "1k"), (13_120, "13.1k"), (131_072, "131k"), (2_449_999, "2.4M"), (7e9, "7G")],
)
def test_counts(number, written):
    assert count(number) == written


@pytest.mark.train
def test_it_takes_the_place_of_bars_and_dictionaries(tmp_path, capsys):
    trainer = tiny.trainer(DUPOTrainer, tmp_path, max_steps=3, disable_tqdm=False)
    trainer.add_callback(HeldOut(trainer, list(tiny.prompts(4))))
    ProgressLines.instead_of_bars(trainer)
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert not kinds & {PrinterCallback, ProgressCallback}
    capsys.readouterr()
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0].split(":")[0] for line in lines] == [
        "held-out first_token_even at step 0",
        "step 1/3",
        "step 2/3",
        "step 3/3",
        "trained 3 steps in 0",
        "held-out first_token_even at step 3",
    ]
