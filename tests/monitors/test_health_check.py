"""Episodes of a health check, with explained variance, which is read as it is. What each check reads is elsewhere."""

import logging
import math
from types import SimpleNamespace

import pytest
from monitors.handwritten import EV, Run, variance
from transformers import TrainerControl


def test_an_episode_is_told_once_and_begins_anew_after_it_is_over(caplog):
    run = Run(variance())
    run.series(EV, -1, -1, 0.5, -1, -1)  # never three in a row
    assert not caplog.records
    run.series(EV, -1, -1, -1, -1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    run.series(EV, 0.5, -1, -1, -1)  # one good log is no recovery
    assert len(run.callback.alarms) == 1
    run.series(EV, 0.5, 0.5, 0.5, -1, -1, -1)
    assert [alarm.step for alarm in run.callback.alarms] == [6, 19]
    assert run.logged("health/explained_variance_alarm") == [0] * 5 + [1] * 10 + [0] * 3 + [1]
    assert run.logged("health/explained_variance")[:4] == [-1, -1, 0.5, -1]


def test_it_says_what_is_wrong_since_when_and_what_to_try(caplog):
    Run(variance()).series(EV, -1, -1, -0.25)
    assert caplog.messages[0].startswith(
        "Health check `explained_variance` at step 3: the critic's explained variance is -0.250, not above 0, 3 logs "
        "in a row. Try a higher `critic_learning_rate`"
    )


def test_only_the_main_process_speaks_but_all_decide(caplog):
    run = Run(variance(stop=True), main=False).series(EV, -1, -1, -1)
    assert not caplog.records
    assert run.flags == (True, True)


def test_without_stop_the_run_goes_on():
    assert Run(variance()).series(EV, *[-1] * 10).flags == (False, False)


def test_stop_saves_and_ends(caplog):
    run = Run(variance(stop=True)).series(EV, -1, -1)
    assert run.flags == (False, False)
    run.series(EV, -1)
    assert run.flags == (True, True)
    assert caplog.messages[0].endswith("The run stops here, with a checkpoint.")


def test_a_stop_found_in_a_log_that_has_no_control_is_handed_over_later():
    run = Run(variance(stop=True, patience=1))
    run.log({EV: -1.0}, control=TrainerControl())  # as held-out measurements do
    assert run.flags == (False, False)
    run.callback.on_step_end(None, run.state, run.control)
    assert run.flags == (True, True)


def test_grace_is_a_share_of_the_run():
    run = Run(variance(grace=0.25, patience=1), max_steps=20).series(EV, *[-1] * 4)  # steps 1 to 4
    assert not run.callback.alarms
    assert run.series(EV, -1).callback.alarms[0].step == 5


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.1"])
def test_what_is_no_number_is_neither_good_nor_bad(value):
    run = Run(variance(patience=2)).series(EV, -1, value, -1)
    assert [alarm.step for alarm in run.callback.alarms] == [3]
    assert run.logged("health/explained_variance") == [-1, None, -1]


def test_logs_of_other_things_change_nothing():
    run = Run(variance(patience=2)).series(EV, -1).log({"loss": 1.0}, {"train_runtime": 2.0}).series(EV, -1)
    assert [alarm.step for alarm in run.callback.alarms] == [4]
    run.callback.on_log(None, run.state, run.control, logs=None)


def test_a_resumed_run_is_where_it_was(caplog):
    values = [-1, -1, 0.5, -1, -1, -1, -1, 0.5, 0.5, 0.5, -1, -1, -1, 0.5]
    whole = Run(variance()).series(EV, *values)
    for cut in range(1, len(values)):
        caplog.clear()
        start = Run(variance()).series(EV, *values[:cut])
        caplog.clear()
        resumed = Run(variance(), history=start.state.log_history)
        assert not caplog.records  # what was told isn't told again
        resumed.series(EV, *values[cut:])
        assert resumed.state.log_history == whole.state.log_history
        assert resumed.callback.alarms == whole.callback.alarms
        assert len(caplog.records) == sum(alarm.step > cut for alarm in whole.callback.alarms)


def test_a_run_that_goes_on_after_a_stop_is_not_stopped_at_once():
    stopped = Run(variance(stop=True)).series(EV, -1, -1, -1)
    resumed = Run(variance(stop=True), history=stopped.state.log_history).series(EV, -1, -1, -1, -1)
    assert resumed.flags == (False, False)
    assert resumed.series(EV, 1, 1, 1, -1, -1, -1).flags == (True, True)


def test_a_state_without_history_is_no_trouble():
    check, control = variance(), TrainerControl()
    state = SimpleNamespace(global_step=1, max_steps=2, log_history=[], is_world_process_zero=True)
    check.on_log(None, state, control, logs={EV: 0.5})
    assert check.value == 0.5
