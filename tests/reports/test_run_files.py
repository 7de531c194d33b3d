"""Settings that are written before a run, and runs that are read back."""

import json

import run_folders

from trl_ext.reports.run_files import read_run, read_settings, write_settings


def test_settings_come_back_without_secrets(tmp_path):
    settings = {
        "learning_rate": 1e-4,
        "hub_token": "hf_abcdefghijklmnopqrstuvwx",
        "reward_funcs": ["a.py:b"],
        "model_init_kwargs": {"token": "abc", "dtype": "float32", "deeper": {"api_key": "abcdefg"}},
        "nothing": None,
        "path": tmp_path,
    }
    write_settings(tmp_path / "new", settings, ["learning_rate", "learning_rate", "hub_token"])
    found, chosen = read_settings(tmp_path / "new")
    assert chosen == ["hub_token", "learning_rate"]
    assert found["learning_rate"] == 1e-4 and found["reward_funcs"] == ["a.py:b"] and found["nothing"] is None
    assert found["path"] == str(tmp_path)
    assert found["hub_token"] == "***" and found["model_init_kwargs"]["token"] == "***"
    assert found["model_init_kwargs"]["deeper"] == {"api_key": "***"}
    assert found["model_init_kwargs"]["dtype"] == "float32"


def test_a_run_of_one_stage(tmp_path):
    run = read_run(run_folders.finished(tmp_path / "run", beta=0.1))
    assert (run.name, run.metric) == ("run", "exact")
    (stage,) = run.stages
    assert (stage.name, stage.steps, stage.max_steps, stage.start) == ("", 20, 20, 0)
    assert [len(run.before), len(run.after)] == [12, 12] and run.before[5].mean("exact") == 0
    assert (run.settings["beta"], run.chosen) == (0.1, ["beta"])


def test_the_newest_checkpoint_is_read(tmp_path):
    for step in (9, 10, 2):
        run_folders.state(tmp_path / f"checkpoint-{step}", run_folders.log(step), max_steps=40)
    assert read_run(tmp_path).stages[0].steps == 10
    run_folders.state(tmp_path, run_folders.log(40))
    assert read_run(tmp_path).stages[0].steps == 40


def test_stages_count_from_the_start(tmp_path):
    run = read_run(run_folders.of_stages(tmp_path / "run"))
    assert [(stage.name, stage.start, stage.steps) for stage in run.stages] == [("dpo", 0, 10), ("ppo", 10, 20)]
    assert [entry["step"] for entry in run.log_history][:12] == [*range(1, 11), 10, 11]
    assert [sum(one.mean("exact") for one in texts) for texts in (run.before, run.after)] == [1, 5]


def test_a_later_round_is_named(tmp_path):
    folder = run_folders.of_stages(tmp_path / "run")
    state = json.loads((folder / "stages.json").read_text())
    run_folders.state(folder / "round_2/ppo", run_folders.log(5))
    state["stages"].append({"name": "ppo", "round": 2, "folder": "round_2/ppo"})
    (folder / "stages.json").write_text(json.dumps(state))
    assert [stage.name for stage in read_run(folder).stages] == ["dpo 1", "ppo 1", "ppo 2"]
