"""What health checks found, in words: the same for a run that was watched and for one that wasn't."""

from pathlib import Path

from trl_ext.reports.health_words import findings, measured
from trl_ext.reports.run_files import Run, TrainedStage


def found(*stages: TrainedStage) -> dict:
    run = Run("run", Path(), list(stages))
    return {(finding.check, finding.stage): finding for finding in findings(run)}


def kl(values: list[float], **further: list[float]) -> list[dict]:
    """A log a step with KL, and further entries for the same steps."""
    return [
        {"step": i + 1, "objective/kl": value} | {name: column[i] for name, column in further.items()}
        for i, value in enumerate(values)
    ]


def test_a_run_that_was_not_watched_is_checked_now():
    # Above the band of 0.5 to 2 from step 5 on: the alarm begins with the 5th such log, and ends with the 5th healthy
    values = [1.0] * 4 + [3.0] * 8 + [1.0] * 8
    finding = found(TrainedStage("", kl(values), 20, 20))["kl", ""]
    assert finding.episodes == [(9, 17)] and not finding.lasts
    assert finding.words.startswith("Out of its range from step 9 to 17. KL to the reference, nats a completion: 1 at")
    assert "above its band of 0.5 to 2, 5 logs in a row" in finding.words and "`kl_coef`" in finding.words


def test_a_run_that_was_watched_is_believed():
    """Its checks may have had other settings."""
    alarms = [0.0] * 10 + [1.0] * 5 + [0.0] * 5
    finding = found(TrainedStage("", kl([1.0] * 20, **{"health/kl_alarm": alarms}), 20, 20))["kl", ""]
    assert finding.episodes == [(11, 16)]
    assert "It left the range that the run was watched for." in finding.words
    watched = kl([3.0] * 20, **{"health/kl_alarm": [0.0] * 20})
    assert found(TrainedStage("", watched, 20, 20))["kl", ""].words.startswith("In its range.")


def test_stages_follow_each_other():
    first = TrainedStage("dpo", [{"step": i, "rewards/accuracies": 0.9} for i in range(1, 11)], 10, 10)
    second = TrainedStage("ppo", kl([3.0] * 10), 10, 10, start=10)
    by_stage = found(first, second)
    assert by_stage["kl", "ppo"].episodes == [(15, 20)] and by_stage["kl", "ppo"].lasts
    assert "from step 15 to 20, to the end of training." in by_stage["kl", "ppo"].words
    assert by_stage["preference_accuracy", "dpo"].words.startswith("In its range.")
    assert by_stage["kl", "dpo"].words == "Not measured: its quantity was not logged."
    run = Run("run", Path(), [first, second])
    assert [(one.check, one.stage) for one in measured(run)] == [("preference_accuracy", "dpo"), ("kl", "ppo")]
