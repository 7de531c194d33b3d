"""Arguments of a run of several stages. Whole runs are in `tests/recipes`."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from huggingface_hub.utils import filter_repo_objects

import trl_ext
from trl_ext.errors import UserError
from trl_ext.run import stages
from trl_ext.run.arguments import HybridArguments


def test_the_first_stage_takes_over_what_the_second_says_of_the_machine(tmp_path):
    args = trl_ext.PPOConfig(**{**tiny.cpu_settings(tmp_path), "num_generations": 1, "seed": 3, "logging_steps": 7})
    dpo = {"beta": 0.3, "logging_steps": 2, "curriculum": "easy_to_hard", "curriculum_column": "margin"}
    pairs = {"split": "mine", "margin": 0.5}
    given = HybridArguments(dpo=dpo, pairs=pairs, clean="none")
    stage = stages.preference_stage(given, args, {"mine": 1, "train": 2})
    assert (stage["dpo_args"].use_cpu, stage["dpo_args"].seed) == (True, 3)
    assert (stage["dpo_args"].beta, stage["dpo_args"].logging_steps) == (0.3, 2)
    assert stage["dpo_kwargs"]["curriculum"].column == "margin"
    assert (stage["pairs"], stage["eval_pairs"], stage["clean"]) == (1, None, None)
    assert stage["pair_settings"] == {"margin": 0.5}
    assert (len(dpo), len(pairs)) == (4, 2)  # as they were


def test_the_defaults_are_the_schedules():
    given, defaults = HybridArguments(), trl_ext.DPOThenPPO.__init__.__kwdefaults__
    for name in ("reference", "rounds", "accuracy_threshold", "accuracy_logs"):
        assert getattr(given, name) == defaults[name], name


def test_what_the_first_stage_does_not_know(tmp_path):
    args = trl_ext.PPOConfig(**{**tiny.cpu_settings(tmp_path), "num_generations": 1})
    for arguments, message in (
        ({"dpo": {"betas": 1}}, "--dpo has betas, which DPOConfig doesn't know"),
        ({"dpo": {"curriculum_column": "digits"}}, "curriculum_column is set, but curriculum isn't"),
        ({"pairs": {"split": "mine"}}, "--pairs is 'mine', but the data set has only: train"),
    ):
        with pytest.raises(UserError, match=message):
            stages.preference_stage(HybridArguments(**arguments), args, {"train": 1})


def test_the_result_is_uploaded_without_what_a_resumed_run_needs(tmp_path, monkeypatch):
    result = {"README.md", "adapter_model.safetensors", "stages.json", "stages.png", "summary.json", "critic/c.json"}
    done: list[Any] = []

    def train() -> None:
        done.append("trained")
        for name in (*result, "start/adapter_config.json", "round_1/dpo/adapter_config.json", "start.part/a.json"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    def create_repo(name: str, **kwargs: Any) -> Any:
        done.append(f"created {name}")
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(repo_id: str, folder_path: Any, ignore_patterns: list[str]) -> Any:
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        done.append((repo_id, set(filter_repo_objects(files, ignore_patterns=ignore_patterns))))
        return SimpleNamespace(repo_url="")

    for name, stand_in in (("create_repo", create_repo), ("upload_folder", upload_folder)):
        monkeypatch.setattr(stages, name, stand_in)
    monkeypatch.setattr(stages, "_report_stages", lambda *given: done.append("reported"))
    monkeypatch.setattr(stages, "write_arguments", lambda *given: done.append("arguments written"))
    args = SimpleNamespace(push_to_hub=True, hub_model_id="mine", hub_private_repo=None)
    schedule: Any = SimpleNamespace(output_dir=tmp_path, train=train)
    arguments: Any = SimpleNamespace(training=args)
    assert stages.train_stages(schedule, arguments, []) is schedule
    # A name that can't be had is reported before the training
    steps = ["created mine", "arguments written", "trained", "reported"]
    assert done == [*steps, ("someone/mine", result)]
