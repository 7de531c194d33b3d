"""Arguments of a run of several stages. Whole runs are in `tests/recipes`."""

import pytest
import tiny

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
