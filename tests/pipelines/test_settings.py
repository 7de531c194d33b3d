"""Settings as the folder of a run has them: what they distinguish, and what they leave out."""

from functools import partial
from typing import Any

import tiny

from trl_ext import DPOConfig
from trl_ext.curriculum.schedule import DifficultyCurriculum
from trl_ext.pipelines.settings import as_json, described, fingerprint, settings_of


def changed(**settings: Any) -> set[str]:
    """Names of the settings of a configuration that differ from the defaults."""
    before, after = (settings_of(DPOConfig(**tiny.pair_settings("out", **s)), "args") for s in ({}, settings))
    return {name for name in before if before[name] != after[name]}


def test_what_decides_the_result_is_a_setting():
    assert changed(beta=0.3, seed=1, per_device_train_batch_size=2) == {
        "args.beta",
        "args.seed",
        "args.per_device_train_batch_size",
    }


def test_what_doesnt_is_none():
    free = {"run_name": "a", "save_steps": 7, "log_level": "error", "push_to_hub": True, "dataloader_num_workers": 1}
    assert changed(**free, gradient_checkpointing=True) == set()
    settings = settings_of(DPOConfig(**tiny.pair_settings("out")), "args")
    assert not {"args.output_dir", "args.report_to"} & settings.keys()


def test_data_sets_are_told_apart_by_rows_columns_and_number():
    rows = tiny.prompts(40)
    prints = [
        fingerprint(rows),
        fingerprint(tiny.prompts(41)),
        fingerprint(rows.rename_column("target", "other")),
        fingerprint(rows.map(lambda row: {"prompt": row["prompt"] + "!"})),
        fingerprint(rows.select(range(39, -1, -1))),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(tiny.prompts(40)) == prints[0] and fingerprint(None) is None


def scorer(prompts: Any, completions: Any) -> list[float]:
    return [0.0] * len(prompts)


def test_objects_are_described_by_what_lasts():
    curriculum = DifficultyCurriculum("mixed", share=0.25)
    assert described(curriculum) == repr(curriculum)
    assert described(partial(scorer, [1], completions=(2.5, None))) == ["scorer", [[1]], {"completions": [2.5, None]}]
    assert described({"a": tiny.prompts(3), 4: tiny.LiveFor}) == {"a": fingerprint(tiny.prompts(3)), "4": "LiveFor"}
    assert described(tiny.LiveFor({4})) == "live_for"  # its `__name__`


def test_json_doesnt_depend_on_the_order_of_a_set():
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert as_json({"start": {"target_modules": names}})["start"]["target_modules"] == sorted(names)
    assert as_json({"start": {"type": float}}) == {"start": {"type": "<class 'float'>"}}
