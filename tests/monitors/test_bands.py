"""Expected numbers: read from a configuration, compared with logs, reported once."""

import json
import logging

import pytest
import tiny
from monitors.handwritten import Run

import trl_ext
from trl_ext.monitors.bands import Bands, bands_of, entries, lines, of_stage


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trl_ext.monitors.bands"]


def test_the_first_log_from_a_step_on_is_judged(caplog):
    bands = Bands({"reward": {3: [0.5, 1.0], 5: [0.5, 1.0]}, "kl": {4: [0, 2]}})
    Run(bands).log({"reward": 0.1}, {"reward": 0.2}, {"kl": 1.0}, {"reward": 0.4, "kl": 1.5}, {"reward": 0.9})
    assert [(band.metric, band.step, band.value, band.at, band.holds) for band in bands.bands] == [
        ("reward", 3, 0.4, 4, False),  # step 3's log has no reward, step 4's has
        ("kl", 4, 1.5, 4, True),
        ("reward", 5, 0.9, 5, True),
    ]
    (message,) = said(caplog)
    assert message.startswith("reward is 0.4 at step 4, expected from 0.5 to 1 at step 3. That is outside")
    assert lines(bands.bands) == [
        "expected numbers: 2 of 3 are in their bands",
        "  reward is 0.4 at step 4, expected from 0.5 to 1 at step 3",
    ]
    band = {"metric": "kl", "step": 4, "low": 0.0, "high": 2.0, "value": 1.5, "at": 4, "reached": True, "holds": True}
    assert entries(bands.bands)[1] == band


def test_the_ends_belong_to_a_band(caplog):
    bands = Bands({"reward": {1: [0.5, 0.5], 2: [-1, float("inf")]}})
    Run(bands).series("reward", 0.5, 7.0)
    assert all(band.holds for band in bands.bands) and not said(caplog)


def test_what_was_never_logged_is_told_and_what_was_not_reached_does_not_count(caplog):
    bands = Bands({"rewards": {2: [0, 1]}, "reward": {4: [0, 1], 50: [0, 1]}})
    run = Run(bands).series("reward", 0.5, None, 0.5, 0.5)
    bands.on_train_end(None, run.state, run.control)
    assert lines(bands.bands) == [
        "expected numbers: 1 of 2 are in their bands",
        "  rewards was not logged from then on, expected from 0 to 1 at step 2",
    ]
    assert [entry["reached"] for entry in entries(bands.bands)] == [True, True, False]
    assert not said(caplog)
    assert lines([]) == []


def test_what_is_no_number_is_outside(caplog):
    bands = Bands({"loss": {2: [0, 9]}})
    Run(bands).series("loss", 1.0, float("nan"), 1.0)
    assert "loss is nan at step 2" in said(caplog)[0] and not bands.bands[0].holds
    assert json.loads(json.dumps(entries(bands.bands), allow_nan=False))[0]["value"] is None


def test_logs_from_before_a_resume_count_in_silence(caplog):
    bands = Bands({"reward": {1: [0.5, 1.0], 3: [0.5, 1.0]}})
    run = Run(bands, history=[{"reward": 0.1, "step": 1}, {"reward": 0.2, "step": 2}])
    run.series("reward", 0.7)
    assert [band.value for band in bands.bands] == [0.1, 0.7] and not said(caplog)


def test_only_the_main_process_speaks(caplog):
    Run(Bands({"reward": {1: [1, 2]}}), main=False).series("reward", 0.0)
    assert not said(caplog)


def test_of_one_stage_of_several():
    assert of_stage({"dpo/loss": {1: [0, 1]}, "ppo/held_out/a": {2: [0, 1]}}, "ppo") == {"held_out/a": {2: [0, 1]}}


@pytest.mark.train
def test_of_a_real_run(tmp_path, caplog):
    trainer = tiny.trainer(trl_ext.GRPOTrainer, tmp_path, max_steps=2, logging_steps=1)
    assert bands_of(trainer) == []
    expect = {"reward": {1: [-1e9, 1e9], 2: [5e8, 1e9], 3: [0, 1]}, "completions/mean_length": {2: [0, 100]}}
    trainer.add_callback(Bands(expect))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = bands_of(trainer)
    assert [(band.step, band.holds, band.reached) for band in found] == [
        *((1, True, True), (2, False, True), (2, True, True), (3, False, False))
    ]
    assert said(caplog)[0].startswith("reward is ")


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"reward": [0, 1]}, r"expect: reward is \[0, 1\] \(a list\)\. Write bands by step"),
        ({"reward": {20: 0.5}}, r"expect: reward, step 20 is 0\.5\. Write the two ends"),
        ({"reward": {20: [0.5]}}, "Write the two ends"),
        ({"reward": {20: [0.5, 0.2]}}, "The lower end comes first"),
        ({"reward": {20: [float("nan"), 0.2]}}, "step 20 has an end that is no number"),
        ({"reward": {20: ["a", 0.2]}}, "expect: reward, step 20 is 'a'"),
        ({"reward": {"late": [0, 1]}}, "expect: reward, step late is 'late'"),
        ({"reward": {-1: [0, 1]}}, r"expect: reward, step -1=-1 must be at least 0"),
    ],
)
def test_what_is_no_band_is_refused(expect, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Bands(expect)


def test_steps_may_be_texts_as_json_has_them():
    assert Bands({"reward": {"20": [0, 1]}}).bands[0].step == 20
