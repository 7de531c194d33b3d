"""The file of finished stages, and complete checkpoints."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest

from trl_ext.evaluation.held_out import Estimate
from trl_ext.pipelines.stages import DATA, DPO, PAIRS, POLICY, START, StageFile, StageResult, whole_checkpoint


WORKER = Path(__file__).with_name("dpo_then_ppo_worker.py")


def test_a_checkpoint_that_was_being_written_is_removed(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(state)
    assert whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert whole_checkpoint(tmp_path / "nothing") is None


def test_the_last_checkpoint_is_the_one_of_the_latest_step(tmp_path: Path) -> None:
    for step in (9, 10, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    assert whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_settings_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Among them sets of names, in an order that Python draws anew for every process."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pipelines.dpo_then_ppo_worker import lora, schedule\n"
        "names = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj', 'gate_proj']\n"
        "schedule(sys.argv[3], peft_config=lora(target_modules=names)).file.save()\n"
    )
    command = ["-c", code, str(WORKER.parents[1]), str(WORKER.parent), str(tmp_path)]
    processes.run(command)  # whose order is that of PYTHONHASHSEED=0
    written = (tmp_path / "stages.json").read_text()
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    assert (tmp_path / "stages.json").read_text() == written


SETTINGS = {name: {f"{name}_setting": 1} for name in (START, DATA, PAIRS, DPO, POLICY)}


def finished(folder: Path, *names: str) -> StageFile:
    """A run in which these stages are finished."""
    file = StageFile(folder, SETTINGS)
    (folder / START).mkdir(parents=True)
    for name in names:
        file.finish(StageResult(name, 1, str(folder / f"round_1/{name}")))
    return file


@pytest.mark.parametrize(
    ("names", "refused"),
    [((PAIRS,), (START, DATA, PAIRS)), ((PAIRS, DPO), (START, DATA, PAIRS, DPO)), ((PAIRS, DPO, "ppo"), SETTINGS)],
)
def test_only_settings_of_stages_to_come_may_change(tmp_path: Path, names: Any, refused: Any) -> None:
    finished(tmp_path, *names)
    for stage in SETTINGS:
        other = {**SETTINGS, stage: {f"{stage}_setting": 2}}
        if stage in refused:
            with pytest.raises(ValueError, match=f"different settings.*{stage}_setting was 1, is 2"):
                StageFile(tmp_path, other)
        else:
            assert StageFile(tmp_path, other).changed == [f"{stage}_setting was 1, is 2"]
    assert StageFile(tmp_path, SETTINGS).changed == []


def test_a_setting_that_is_gone_and_a_new_one_are_changes(tmp_path: Path) -> None:
    """As in a release that renames an argument."""
    finished(tmp_path, PAIRS)
    renamed = {"renamed_setting": 1}
    with pytest.raises(ValueError, match=r"pairs_setting was 1, is None; renamed_setting was None, is 1\. "):
        StageFile(tmp_path, {**SETTINGS, PAIRS: renamed})
    assert StageFile(tmp_path, {**SETTINGS, DPO: {}}).changed == ["dpo_setting was 1, is None"]


@pytest.mark.parametrize(("stage", "begun"), [(DPO, DPO), ("ppo", POLICY)])
def test_a_checkpoint_says_that_a_stage_has_begun(tmp_path: Path, stage: str, begun: str) -> None:
    finished(tmp_path, PAIRS)
    other = {**SETTINGS, begun: {f"{begun}_setting": 2}}
    StageFile(tmp_path, other)
    (tmp_path / f"round_1/{stage}/checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{begun}_setting was 1, is 2"):
        StageFile(tmp_path, other)


def test_a_stage_is_read_as_it_was_written(tmp_path: Path) -> None:
    measured = {"exact": Estimate(0.5, 0.25, 0.75, 4, 8, per_prompt=(0.5, 0.5))}
    result = StageResult(DPO, 1, str(tmp_path / "round_1/dpo"), 7, 80, 1.5, measured)
    file = finished(tmp_path, PAIRS)
    file.finish(result)
    read = StageFile(tmp_path, SETTINGS)
    assert read.find(DPO, 1) == replace(result, measured={"exact": replace(measured["exact"], per_prompt=())})
    assert read.find(DPO, 2) is None and read.find("ppo", 1) is None
    assert file.stages[-1].measured == measured  # only the file leaves the prompts out
    assert read.stages[0].log_history == []
    (tmp_path / "round_1/dpo").mkdir(parents=True)
    (tmp_path / "round_1/dpo/trainer_state.json").write_text('{"log_history": [{"loss": 0.5, "step": 1}]}')
    assert read.stages[1].log_history == [{"loss": 0.5, "step": 1}]


def test_stages_without_a_file_are_refused(tmp_path: Path) -> None:
    finished(tmp_path, PAIRS).path.unlink()
    with pytest.raises(ValueError, match=r"holds stages of a run, but no stages\.json that describes them"):
        StageFile(tmp_path, SETTINGS)
