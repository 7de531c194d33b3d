"""Each kind of bad checkpoint once: it is named, with what is wrong, and the one before it is offered, or taken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from trl_ext import DAPOTrainer
from trl_ext.trainers.seams.whole_checkpoints import MANIFEST, DamagedCheckpointError, checkpoint_to_resume


pytestmark = pytest.mark.train
WEIGHTS, STATE = "model.safetensors", "trainer_state.json"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# What is done to a checkpoint, and what is said of it: with its manifest, and as a plain trainer writes it, without
KINDS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "truncated safetensors": (lambda at: cut(at / WEIGHTS), f"{WEIGHTS} has ", f"{WEIGHTS} is not complete"),
    "a missing file": (lambda at: (at / STATE).unlink(), f"{STATE} is missing", f"{STATE} is missing"),
    "garbage in json": (
        lambda at: (at / STATE).write_bytes(b"\x80" * (at / STATE).stat().st_size),
        f"{STATE} is not what was written",
        f"{STATE} is not complete",
    ),
    "a wrong checksum": (lambda at: flip(at / WEIGHTS), f"{WEIGHTS} is not what was written", None),
    "a truncated optimizer": (
        lambda at: cut(at / "optimizer.pt"),
        "optimizer.pt has ",
        "optimizer.pt is not complete",
    ),
    "half a manifest": (lambda at: cut(at / MANIFEST), f"{MANIFEST} is not complete", None),
    "an empty folder": (empty, f"{STATE} is missing", f"{STATE} is missing"),
}
CASES = [(kind, manifest) for kind, (_, _, plain) in KINDS.items() for manifest in (True, False) if manifest or plain]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("written")
    tiny.trainer(DAPOTrainer, folder, tiny.hashed, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture(scope="module")
def trainer(written: Path) -> Any:
    return tiny.trainer(DAPOTrainer, written, tiny.hashed)


@pytest.mark.parametrize(("kind", "manifest"), CASES)
def test_it_is_named_and_the_one_before_it_is_offered(kind, manifest, written, trainer, tmp_path, monkeypatch, caplog):
    damage, with_manifest, without = KINDS[kind]
    output = tmp_path / "out"
    shutil.copytree(written, output)
    newest = output / "checkpoint-2"
    if not manifest:
        (newest / MANIFEST).unlink()
    damage(newest)
    problem = with_manifest if manifest else without
    monkeypatch.setattr(trainer.args, "output_dir", str(output))
    with pytest.raises(DamagedCheckpointError) as error:
        checkpoint_to_resume(trainer, str(newest))
    assert f"{str(newest)!r} is damaged: {problem}" in str(error.value)
    assert "The newest whole one beside it is checkpoint-1; resume_from_checkpoint=True looks" in str(error.value)
    assert checkpoint_to_resume(trainer, True) == str(output / "checkpoint-1")
    assert "Resuming from checkpoint-1" in caplog.text and f"checkpoint-2: {problem}" in caplog.text
