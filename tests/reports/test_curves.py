"""Curves of a run."""

import run_folders

from trl_ext.reports.curves import _by_stage, _course, first_of
from trl_ext.reports.run_files import read_run


def test_no_curve_goes_over_the_end_of_a_stage(tmp_path):
    """DPO of 10 steps with a loss of 0.5, then PPO of 20 with losses of its own."""
    run = read_run(run_folders.of_stages(tmp_path / "run"))
    loss = first_of("loss")
    steps, _ = _course(run, loss)
    (dpo, values), *others = _by_stage(run, _course(run, loss))
    assert dpo == list(range(1, 11)) and set(values) == {0.5}
    assert [step for part, _ in others for step in part] == steps[10:]


def test_a_plain_run_has_one_part_with_its_start(tmp_path):
    run = read_run(run_folders.finished(tmp_path / "run"))
    course = ([0, 1, 2], [0.1, 0.2, 0.3])
    assert _by_stage(run, course) == [course]
