"""Checkpoints are whole or not there, whatever happens while they are written; what resumes takes whole ones only."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

from trl_ext import DAPOTrainer, DPOConfig, DPOTrainer, GRPOTrainer, PPOTrainer
from trl_ext.trainers.seams import whole_checkpoints
from trl_ext.trainers.seams.whole_checkpoints import (
    ASIDE,
    MANIFEST,
    REPLACED,
    DamagedCheckpointError,
    checkpoints_of,
    damage,
    newest_whole,
    write_manifest,
)


pytestmark = pytest.mark.train
SAVING = {"save_strategy": "steps", "save_steps": 1}


def written(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def pairs_trainer(folder: Any, **settings: Any) -> Any:
    data = Dataset.from_dict({"prompt": ["w0 w1"] * 8, "chosen": [" w2"] * 8, "rejected": [" w3 w4"] * 8})
    args = DPOConfig(**tiny.pair_settings(folder, **settings))
    model = Path(folder).parent / "policy"  # the reference is read from its name
    if not model.exists():
        tiny.stopping().save_pretrained(model)
    return DPOTrainer(str(model), args=args, train_dataset=data, eval_dataset=data, processing_class=tiny.tokenizer())


def trainer(kind: str, folder: Any, **settings: Any) -> Any:
    if kind == "dpo":
        return pairs_trainer(folder, **settings)
    return tiny.trainer({"grpo": GRPOTrainer, "dapo": DAPOTrainer, "ppo": PPOTrainer}[kind], folder, **settings)


KINDS = ["grpo", "dapo", "ppo", "dpo"]


# The manifest


def test_damage_names_the_first_file_that_is_wrong(tmp_path):
    whole = written(tmp_path / "checkpoint-1", a__bin="12345", b__json="{}")
    (whole / "sub").mkdir()
    (whole / "sub" / "c").write_text("x")
    write_manifest(whole, processes=1)
    assert damage(whole) is None
    assert set(json.loads((whole / MANIFEST).read_text())["files"]) == {"a.bin", "b.json", "sub/c"}
    (whole / "more").write_text("a file that nobody wrote down does no harm")
    assert damage(whole) is None
    (whole / "a.bin").write_text("1234")
    assert damage(whole) == "a.bin has 4 bytes in place of 5"
    (whole / "a.bin").write_text("12346")
    assert damage(whole) == "a.bin is not what was written"
    (whole / "a.bin").write_text("12345")
    (whole / "sub" / "c").unlink()
    assert damage(whole) == "sub/c is missing"
    (whole / MANIFEST).write_text('{"files": {"a.bin"')
    assert damage(whole) == f"{MANIFEST} is not complete"


def test_without_a_manifest_transformers_own_state_decides(tmp_path):
    assert damage(written(tmp_path / "a", model="x")) == "trainer_state.json is missing"
    assert damage(written(tmp_path / "b", trainer_state__json="")) == "trainer_state.json is not complete"
    assert damage(written(tmp_path / "c", trainer_state__json="{}")) is None


def test_the_newest_whole_one(tmp_path):
    for step, text in ((2, "{}"), (10, "{}"), (9, "{}"), (11, "")):
        written(tmp_path / f"checkpoint-{step}", trainer_state__json=text)
    written(tmp_path / "checkpoint-x", trainer_state__json="{}")
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"checkpoint-{step}" for step in (11, 10, 9, 2)]
    newest, damaged = newest_whole(tmp_path)
    assert newest == tmp_path / "checkpoint-10" and list(damaged) == ["checkpoint-11"]
    assert newest_whole(tmp_path / "nothing") == (None, {})


# Saving


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_of_a_checkpoint_is_in_its_manifest(kind, tmp_path):
    made = trainer(kind, tmp_path, **SAVING)
    made.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    assert not (tmp_path / ASIDE).exists() and not (tmp_path / REPLACED).exists()
    for checkpoint in checkpoints_of(tmp_path):
        there = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST}
        assert set(json.loads((checkpoint / MANIFEST).read_text())["files"]) == there >= {"optimizer.pt"}
        assert damage(checkpoint) is None


class FullDiskError(OSError):
    pass


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        *(("grpo", file) for file in ("scheduler.pt", "trainer_state.json", "manifest", "move")),
        *(("dpo", file) for file in ("scheduler.pt", "move")),
        ("ppo", "trainer_state.json"),
        ("dapo", "manifest"),
    ],
)
def test_a_save_that_fails_leaves_the_others_as_they_were(kind, file, tmp_path, monkeypatch):
    """The disk is full at some point of the second save; only one checkpoint is kept."""
    made = trainer(kind, tmp_path, save_total_limit=1, **SAVING)
    step = lambda: made.state.global_step  # noqa: E731
    save, state = torch.save, type(made.state).save_to_json
    write, move = whole_checkpoints.write_manifest, whole_checkpoints._move

    def full(what: str) -> None:
        if step() == 2 and what == file:
            raise FullDiskError("No space left on device")

    def torch_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        full(Path(str(path)).name)

    monkeypatch.setattr(torch, "save", torch_save)
    monkeypatch.setattr(
        type(made.state), "save_to_json", lambda self, path: (state(self, path), full(Path(path).name))
    )
    monkeypatch.setattr(whole_checkpoints, "write_manifest", lambda *args: (full("manifest"), write(*args)))
    monkeypatch.setattr(whole_checkpoints, "_move", lambda *args: (full("move"), move(*args)))
    with pytest.raises(FullDiskError):
        made.train()
    monkeypatch.undo()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1"]
    assert damage(tmp_path / "checkpoint-1") is None
    again = trainer(kind, tmp_path, save_total_limit=1, **SAVING)
    again.train(resume_from_checkpoint=True)
    whole = trainer(kind, tmp_path / "whole", **SAVING)
    whole.train()
    for name, value in tiny.weights(whole.model).items():
        assert torch.equal(tiny.weights(again.model)[name], value), name


def test_one_that_is_saved_again_is_replaced_as_a_whole(tmp_path):
    made = trainer("grpo", tmp_path, **SAVING)
    made.train()
    (tmp_path / "checkpoint-2" / "left_over.bin").write_text("of an earlier save")
    made._save_checkpoint(made.model, trial=None)
    assert not (tmp_path / "checkpoint-2" / "left_over.bin").exists()
    assert damage(tmp_path / "checkpoint-2") is None


def test_a_kill_between_the_two_moves(tmp_path):
    made = trainer("grpo", tmp_path, save_total_limit=1, **SAVING)
    made.train()
    (tmp_path / REPLACED).mkdir()
    os.rename(tmp_path / "checkpoint-2", tmp_path / REPLACED / "checkpoint-2")
    again = trainer("grpo", tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_the_best_model_is_found_at_its_place(kind, tmp_path):
    best = {"metric_for_best_model": "loss", "greater_is_better": False, "load_best_model_at_end": True}
    settings = {"eval_strategy": "steps", "eval_steps": 1, **best, **SAVING}
    if kind == "dpo":
        made = pairs_trainer(tmp_path, **settings)
    else:
        made = tiny.trainer(GRPOTrainer, tmp_path, tiny.hashed, {"eval_dataset": tiny.prompts(4)}, **settings)
    made.train()
    found = made.state.best_model_checkpoint
    assert Path(found).parent == tmp_path and damage(Path(found)) is None
    for checkpoint in checkpoints_of(tmp_path):
        saved = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert saved is None or ASIDE not in saved


# Resuming


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trl_ext_state.pt", "model.safetensors"]
)
def test_a_damaged_one_is_passed_over(file, tmp_path, caplog):
    trainer("grpo", tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-2" / file).unlink()
    whole = trainer("grpo", tmp_path / "whole", **SAVING)
    whole.train()
    again = trainer("grpo", tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert f"checkpoint-2: {file} is missing" in caplog.text and "Resuming from checkpoint-1" in caplog.text
    for name, value in tiny.weights(whole.model).items():
        assert torch.equal(tiny.weights(again.model)[name], value), name


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_a_damaged_one_that_is_named_is_an_error(kind, tmp_path):
    trainer(kind, tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    again = trainer(kind, tmp_path, **SAVING)
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.pt has 0 bytes in place of .* checkpoint-1"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_nothing_to_resume(kind, tmp_path):
    again = trainer(kind, tmp_path, **SAVING)
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is no folder"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    again.train()
    for checkpoint in checkpoints_of(tmp_path):
        (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"no whole checkpoint \(checkpoint-2: trainer_state.json is missing; checkpoint-1"
    ):
        trainer(kind, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_finished_run_trains_no_further(kind, length, tmp_path):
    first = trainer(kind, tmp_path, **SAVING, **length)
    first.train()
    steps = first.state.global_step
    again = trainer(kind, tmp_path, **SAVING, **length)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps >= 1
    for name, value in tiny.weights(first.model).items():
        assert torch.equal(tiny.weights(again.model)[name], value), name


def test_a_checkpoint_from_before_there_were_manifests(tmp_path):
    trainer("grpo", tmp_path, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1" / MANIFEST).unlink()
    again = trainer("grpo", tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


# A reference that moves


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_a_reference_that_moves_is_in_the_checkpoint(kind, tmp_path):
    settings = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 4, **SAVING}
    if kind == "dpo":
        runs = [trainer(kind, tmp_path / name, **settings) for name in ("whole", "again")]
    else:
        tiny.stopping().save_pretrained(tmp_path / "policy")
        given = {"model": str(tmp_path / "policy")}
        runs = [
            tiny.trainer(GRPOTrainer, tmp_path / name, tiny.hashed, given, **settings) for name in ("whole", "again")
        ]
    whole, again = runs
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-2" / whole_checkpoints.REFERENCE_FILE).exists()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for model in ("model", "ref_model"):
        found = tiny.weights(getattr(again, model))
        for name, value in tiny.weights(getattr(whole, model)).items():
            assert torch.equal(found[name], value), (model, name)


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


OWN = ["trl_ext_state.pt", "trl_ext_buffer_0.pt", "trl_ext_process_0.pt", "trl_ext_reference.pt"]
OF_TRANSFORMERS = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


@pytest.fixture(scope="module")
def with_all_files(tmp_path_factory):
    """A checkpoint with every kind of file that is no safetensors and no json."""
    folder = tmp_path_factory.mktemp("all_files")
    tiny.stopping().save_pretrained(folder / "policy")
    resumable(folder, folder / "out", max_steps=3).train()
    checkpoint = folder / "out" / "checkpoint-3"
    pickled = {path.name for path in checkpoint.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")}
    assert pickled == {*OWN, *OF_TRANSFORMERS}
    (checkpoint / MANIFEST).unlink()  # whoever plants code can write a manifest, too
    return folder


def resumable(folder: Path, output: Path, **settings: Any) -> Any:
    settings = {"num_iterations": 2, "replay_ratio": 0.5, "sync_ref_model": True, **settings, **SAVING}
    return tiny.trainer(PPOTrainer, output, tiny.hashed, {"model": str(folder / "policy")}, **settings)


@pytest.mark.parametrize("file", [*OWN, *OF_TRANSFORMERS])
def test_planted_code_does_not_run(file, with_all_files, tmp_path):
    checkpoint, trace = tmp_path / "out" / "checkpoint-3", tmp_path / "planted_code_has_run"
    shutil.copytree(with_all_files / "out" / "checkpoint-3", checkpoint)
    planted = Planted(trace)
    torch.save({"run": planted, "layout": {}, "step": 0, "metrics": {}, "replay": planted}, checkpoint / file)
    again = resumable(with_all_files, tmp_path / "out", max_steps=4)
    if file == "training_args.bin":  # nothing reads it
        again.train(resume_from_checkpoint=str(checkpoint))
    else:
        refusal = f"{file} holds something that trl_ext does not write" if file in OWN else "Weights only load failed"
        with pytest.raises((ValueError, pickle.UnpicklingError), match=refusal):
            again.train(resume_from_checkpoint=str(checkpoint))
    assert not trace.exists()
    torch.load(checkpoint / file, weights_only=False)
    assert trace.exists()  # or it would have proved nothing
