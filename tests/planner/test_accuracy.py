"""
The planner against real runs of trainers: a few cases in one process here, all of them in
`tests/distributed/test_planner_accuracy.py`.
"""

import planner_accuracy
import planner_runs
import pytest


def worst(table):
    """The largest errors, of totals and of parts, with their names."""
    found = planner_accuracy.summary(table)
    return {kind: next(iter(errors.items())) for kind, errors in found.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    planner_runs.write_models(
        folder, planner_runs.shape("tiny"), planner_accuracy.jobs("steps", "tiny", "none")["dapo LoRA"]
    )
    return folder


@pytest.mark.parametrize("name", ["ppo head LoRA", "dapo full", "dpo LoRA shared"])
def test_a_real_step_takes_what_is_planned(name, models, tmp_path):
    """What is held, too, of one process."""
    job = planner_accuracy.jobs("steps", "tiny", "none")[name]
    found = planner_runs.run(job, models, tmp_path)
    assert job.share_prefixes or max(found.padded.values())
    table = {kind: {name: planner_accuracy.compared(kind, job, found)} for kind in ("states", "steps")}
    for kind, (part, error) in worst(table).items():
        assert abs(error) <= {"totals": planner_accuracy.OF_TOTAL, "parts": planner_accuracy.OF_PART}[kind], part
