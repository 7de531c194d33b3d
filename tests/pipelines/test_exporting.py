"""Which of a run's saved models is exported."""

import json
from pathlib import Path

import pytest
import tiny
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from trl_ext import export_role
from trl_ext.pipelines.exporting import find_source
from trl_ext.roles.saved import roles_of
from trl_ext.trainers.seams.whole_checkpoints import write_manifest


def save(folder: Path, best: Path | None = None) -> None:
    """A folder as a trainer leaves one."""
    tiny.qwen2().save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": best and str(best)}))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run whose second checkpoint of three is the best, at a place where it has been moved to."""
    folder = tmp_path / "run"
    for step in (2, 4, 10):
        save(folder / f"checkpoint-{step}", Path("elsewhere/run/checkpoint-4"))
        write_manifest(folder / f"checkpoint-{step}", 1)
    return folder


def test_a_model_at_the_end_comes_first(run):
    save(run)
    assert find_source(run) == (run, [])
    export = export_role(run)
    assert export.folder == run / "exported" / "policy"
    assert roles_of(export.folder) == ["policy"]


def test_checkpoints(run):
    last = run / "checkpoint-10"
    said = ["The run has not ended with a model: exported is checkpoint-10, its last whole checkpoint."]
    assert find_source(run) == (last, said)
    assert find_source(run, "last") == (last, [])
    assert find_source(run, 2) == find_source(run, "2") == (run / "checkpoint-2", [])
    assert find_source(run, "best") == (run / "checkpoint-4", [])
    assert find_source(last) == (last, [])
    assert export_role(last).folder == run / "exported" / "policy"
    assert export_role(run, checkpoint=2).folder == run / "exported" / "policy-checkpoint-2"


def test_a_damaged_checkpoint(run):
    (run / "checkpoint-10" / "config.json").write_text("{}")
    source, (note, passed_over) = find_source(run)
    assert source == run / "checkpoint-4" and "exported is checkpoint-4" in note
    assert passed_over.startswith("Newer checkpoints are damaged and passed over: checkpoint-10: config.json has 2 by")
    with pytest.raises(ValueError, match=r"checkpoint-10' is damaged: .* The newest whole one is checkpoint-4\."):
        find_source(run, 10)
    with pytest.raises(ValueError, match=r"checkpoint-10' is damaged: config\.json has 2 bytes"):
        find_source(run / "checkpoint-10")


def test_what_is_not_there(run, tmp_path):
    listed = r"There are: checkpoint-10, checkpoint-4, checkpoint-2\."
    with pytest.raises(ValueError, match=rf"has no checkpoint-3\. {listed}"):
        find_source(run, 3)
    with pytest.raises(ValueError, match=rf"checkpoint is 'newest'\. .* {listed}"):
        find_source(run, "newest")
    for step in (2, 4, 10):
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is marked as its best\. Train with metric_for_best_model"):
        find_source(run, "best")
    with pytest.raises(ValueError, match=r"none' is no folder\. Pass the output folder of a run"):
        find_source(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Nothing is saved in '.*empty': no model and no checkpoint\. Pass the"):
        find_source(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty' has no whole checkpoint\. There are none\."):
        find_source(tmp_path / "empty", "last")


def test_a_run_of_stages_that_has_not_ended(tmp_path):
    save(tmp_path / "round_1" / "dpo")
    (tmp_path / "stages.json").write_text(
        json.dumps({"stages": [{"folder": "round_1/pairs"}, {"folder": "round_1/dpo"}]})
    )
    with pytest.raises(ValueError, match=rf"hasn't ended\. Pass the folder of one: {tmp_path}/round_1/dpo\."):
        find_source(tmp_path)
    assert find_source(tmp_path / "round_1" / "dpo") == (tmp_path / "round_1" / "dpo", [])


def test_a_model_without_a_tokenizer_gets_that_of_its_base(tmp_path):
    base = tmp_path / "base"
    tiny.qwen2(pad_token_id=None, eos_token_id=5).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny.lora()).save_pretrained(tmp_path / "run")
    export = export_role(tmp_path / "run", merge=True)
    assert (export.folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    # Its special tokens are the model's, as in training
    config, generation = (
        json.loads((export.folder / f"{name}config.json").read_text()) for name in ("", "generation_")
    )
    assert config["pad_token_id"] == generation["pad_token_id"] == 0
    assert config["eos_token_id"] == 2 and 2 in generation["eos_token_id"]
