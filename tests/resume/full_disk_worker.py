"""
A run on a disk that is full when the second checkpoint is written: `full_disk_worker.py TRAINER FOLDER DISK`. DISK is
"tmpfs", a small one of this process's own, or "limit", a largest size of files. Then there is space again, and the run
goes on; its weights are written to FOLDER. The exit status `NO_DISK` says that there can't be such a disk here.
"""

import ctypes
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from resume.cases import built
from transformers import TrainerCallback

from trl_ext.trainers.seams.whole_checkpoints import ASIDE, checkpoints_of, damage


NO_DISK = 77
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare(2)
UNLIMITED = resource.RLIM_INFINITY


def mount(folder: Path) -> None:
    """A disk of 16 MB, which only this process sees, and which ends with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS) and libc.unshare(NEW_USER | NEW_MOUNTS):
        sys.exit(NO_DISK)
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # recursively private
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=16m"):
        sys.exit(NO_DISK)


class Fills(TrainerCallback):
    """Leaves no space after the first step, whose checkpoint is written."""

    def __init__(self, disk: str, filler: Path) -> None:
        self.disk, self.filler = disk, filler

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        if self.disk == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, UNLIMITED))
            return
        free = os.statvfs(self.filler.parent)
        with self.filler.open("wb") as file:
            file.write(b"\0" * (free.f_bavail * free.f_frsize - 40_960))

    def empty(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
        self.filler.unlink(missing_ok=True)


def main(trainer: str, folder: Path, disk: str) -> None:
    place = folder / "disk"
    place.mkdir()
    if disk == "tmpfs":
        mount(place)
    output, fills = place / "out", Fills(disk, place / "filler")
    made = built(trainer, "plain", folder, output)
    made.add_callback(fills)
    try:
        made.train()
    except Exception as error:
        traceback.print_exc()
        print("SAID", *error.__notes__)
    else:
        raise AssertionError("there was space")
    fills.empty()
    assert [path.name for path in checkpoints_of(output)] == ["checkpoint-1"]
    assert damage(output / "checkpoint-1") is None
    assert not (output / ASIDE).exists()
    again = built(trainer, "plain", folder, output)
    again.train(resume_from_checkpoint=True)
    torch.save(tiny.weights(again.model), folder / "weights.pt")


main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
