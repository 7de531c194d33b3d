"""
Checkpoints that are whole or not there. A checkpoint is written aside, by all processes; when all are done, a manifest
with the size and hash of every file is added, everything is flushed to the disk, and the folder is moved to its place
in one step. Only then are older checkpoints deleted. A process that is killed at any moment, or a disk that is full,
leaves the checkpoints that were there before as they were.

What resumes asks the manifest: `resume_from_checkpoint=True` takes the newest checkpoint that is whole, and reports
those that it passed over; a path to a damaged one is an error that names the damage and the newest whole one.

These are functions of a transformers trainer, so that the seams of GRPO and of DPO share them.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length, rotate_checkpoints

from ...errors import require
from ...redaction import without_secrets
from ...roles.critic import critic_of
from ...roles.quantized import keep_weights_trainable
from ...roles.saved import REFERENCE_FILE, read_plain
from ...roles.trunk import REFERENCE_ADAPTER
from .lost_processes import watching_processes
from .parts import describe_parts, parts_are_all, whole_weights, writes_parts
from .preemption import preemption_of
from .pushes import copy_critic, creation_of_repository, push_of_checkpoint, wait_for_pushes
from .quantized import SavesQuantization
from .waiting import limit_waiting


logger = get_logger(__name__)

MANIFEST = "trl_ext_manifest.json"
FORMAT = 1
# Folders in an output folder: of a checkpoint in the making, and of one that is being replaced. What begins with `_`
# is kept out of pushes to the Hub.
ASIDE, REPLACED = "_checkpoint_in_the_making", "_checkpoint_replaced"
TRAINER_STATE = "trainer_state.json"
# The adapter `ref` that is refreshed, beside the shards of DeepSpeed and FSDP
REFERENCE_ADAPTER_FILE = "trl_ext_reference_adapter.pt"


class DamagedCheckpointError(ValueError):
    """A checkpoint lacks a file, or a file in it is not the one that was written."""


# What is whole


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have what was written to a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def write_manifest(checkpoint: Path, processes: int) -> None:
    """
    Write down what a checkpoint consists of, and flush it to the disk.

    Args:
        checkpoint (`Path`):
            The folder, which no process writes to any more.
        processes (`int`):
            How many processes wrote it.
    """
    files = {}
    for path in _files(checkpoint):
        _flush(path)
        files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    manifest = checkpoint / MANIFEST
    manifest.write_text(
        json.dumps({"format": FORMAT, "processes": processes, "files": files}, indent=1) + "\n", encoding="utf-8"
    )
    _flush(manifest)
    for folder in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        _flush(folder)


def _is_complete(path: Path) -> bool:
    """Whether a file that no manifest describes holds all of what its format says that it holds."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
    elif path.suffix == ".safetensors":  # bytes of the header, header, tensors
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                tensors = json.loads(file.read(min(size, path.stat().st_size)))
            except ValueError:
                return False
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        return path.stat().st_size == 8 + size + max(ends, default=0)
    elif path.suffix in (".pt", ".pth", ".bin"):  # archives, whose table of contents is at their end
        return zipfile.is_zipfile(path)
    return True


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint, `None` if nothing is. One without a manifest, as earlier versions and plain
    trainers write it, passes if transformers' own state is there and no file is cut off: nothing more is known of it.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        if not (checkpoint / TRAINER_STATE).is_file():
            return f"{TRAINER_STATE} is missing"
        broken = [path for path in _files(checkpoint) if not _is_complete(path)]
        return f"{broken[0].relative_to(checkpoint).as_posix()} is not complete" if broken else None
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not complete"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes in place of {expected['bytes']}"
        if _digest(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The checkpoints of an output folder, whole or not, the newest first."""
    found = []
    for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if output_dir.is_dir() else []:
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if number and path.is_dir():
            found.append((int(number[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer, by name."""
    damaged: dict[str, str] = {}
    for path in checkpoints_of(output_dir):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged[path.name] = problem
    return None, damaged


# Resuming


def checkpoint_to_resume(trainer: Any, asked: str | os.PathLike[str] | bool | None) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` stands for; the main process decides for all.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        asked (`str`, `bool`, *optional*):
            A folder; `True`: the newest whole checkpoint in the output folder.

    Raises:
        DamagedCheckpointError: if the folder that was named is damaged.
        ValueError: if there is no whole checkpoint, or no such folder.
    """
    if not asked:
        return None
    found: list[Any] = [None, None]
    if trainer.is_world_process_zero():
        found = list(_looked_for(Path(str(trainer.args.output_dir)), asked))
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(found)
    path, error = found
    if error is not None:
        raise error
    return str(path)


def _looked_for(output_dir: Path, asked: str | os.PathLike[str] | bool) -> tuple[str | None, ValueError | None]:
    if asked is True:
        put_back(output_dir)
        newest, damaged = newest_whole(output_dir)
        listed = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
        if newest is None:
            none = f"no whole checkpoint ({listed})" if damaged else "no checkpoint"
            return None, ValueError(
                f"resume_from_checkpoint=True, but there is {none} in {output_dir}. Start without it, or pass the "
                "folder of a checkpoint."
            )
        if damaged:
            logger.warning(f"Resuming from {newest.name}. Newer checkpoints are damaged and passed over: {listed}.")
        return str(newest), None
    path = Path(str(asked))
    if not path.is_dir():
        return None, ValueError(f"resume_from_checkpoint={str(path)!r} is no folder. Pass a checkpoint's, or True.")
    problem = damage(path)
    if problem is None:
        return str(path), None
    newest, _ = newest_whole(path.parent)
    instead = f"The newest whole one beside it is {newest.name}" if newest else "There is no whole one beside it"
    return None, DamagedCheckpointError(
        f"resume_from_checkpoint={str(path)!r} is damaged: {problem}. {instead}; resume_from_checkpoint=True looks "
        "for the newest whole one."
    )


# Saving


@contextmanager
def written_aside(trainer: Any, output_dir: str) -> Iterator[Path]:
    """
    Have a checkpoint written aside, and moved to its place when all processes are done.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, whose `_get_output_dir` must return what is yielded here while it saves.
        output_dir (`str`):
            Where its checkpoints are.

    Yields:
        `Path`: the folder in which the checkpoint has to be written, under its own name.
    """
    run, accelerator = Path(output_dir), trainer.accelerator
    aside = run / ASIDE
    moves = accelerator.is_local_main_process
    if moves:  # of a process that was killed while it saved
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    try:
        yield aside
    except BaseException as error:
        if accelerator.num_processes == 1:  # others may still write
            shutil.rmtree(aside, ignore_errors=True)
        earlier = [path.name for path in checkpoints_of(run)[:1]]
        go_on = (
            f"{earlier[0]} is as it was: go on with resume_from_checkpoint=True." if earlier else "There is none yet."
        )
        error.add_note(f"The checkpoint of step {trainer.state.global_step} was not written. {go_on}")
        raise
    accelerator.wait_for_everyone()
    if moves and aside.is_dir():  # on a disk that machines share, the first has moved it
        for checkpoint in list(aside.iterdir()):
            write_manifest(checkpoint, accelerator.num_processes)
            _move(checkpoint, run / checkpoint.name)
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    if trainer.args.should_save:
        rotate_checkpoints(
            output_dir=output_dir,
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )


def _move(checkpoint: Path, place: Path) -> None:
    """Put a whole checkpoint into its place. One that is there is replaced as a whole, never file by file."""
    replaced = place.parent / REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    if place.exists():
        replaced.mkdir()
        place.rename(replaced / place.name)
    checkpoint.rename(place)
    _flush(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back(output_dir: Path) -> None:
    """What a process that was killed between the two moves of [`_move`] left."""
    replaced = output_dir / REPLACED
    for checkpoint in list(replaced.iterdir()) if replaced.is_dir() else []:
        if not (output_dir / checkpoint.name).exists():
            checkpoint.rename(output_dir / checkpoint.name)
    shutil.rmtree(replaced, ignore_errors=True)


def require_trainable(trainer: Any) -> None:
    """
    Raises `ValueError` if no weight of the policy can be trained: an adapter that was loaded for inference, or a model
    whose weights are all frozen. A critic alone would train, and so would a KL term, without moving the policy.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    critic = critic_of(policy)
    own = {id(weight) for weight in (*critic.parameters(), *critic.trained_parameters())} if critic else set()
    require(
        any(weight.requires_grad for weight in policy.parameters() if id(weight) not in own),
        "No weight of the policy can be trained: all are frozen. Load an adapter with is_trainable=True "
        "(PeftModel.from_pretrained), pass a peft_config for a new one, or unfreeze the model.",
    )


# A reference that moves during training (`sync_ref_model`)


def moved_reference(trainer: Any) -> tuple[Any, set[int] | None, str] | None:
    """
    The reference that checkpoints need a file for: one that is refreshed, a model of its own or, where DeepSpeed and
    FSDP leave out what isn't trained, the adapter `ref`.

    Returns:
        `tuple[nn.Module, set[int] | None, str]` or `None`: the model that holds it, the `id`s of its weights (`None`:
        all of the model), and the name of the file.
    """
    if not getattr(trainer.args, "sync_ref_model", False):
        return None
    if trainer.ref_model is not None:
        return trainer.accelerator.unwrap_model(trainer.ref_model), None, REFERENCE_FILE
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return None  # saved and loaded with the other adapters
    policy = trainer.accelerator.unwrap_model(trainer.model)
    weights = {id(weight) for name, weight in policy.named_parameters() if REFERENCE_ADAPTER in name.split(".")}
    return policy, weights, REFERENCE_ADAPTER_FILE


@contextmanager
def whole_weight(weight: torch.Tensor, modified: bool = False) -> Iterator[None]:
    """
    Within this context, every process holds a weight that ZeRO-3 has spread; of one that is `modified`, all take what
    the first has at the end.
    """
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0 if modified else None):
        yield


def gathered_weights(model: Any, among: set[int] | None = None) -> dict[str, torch.Tensor]:
    """
    The whole weights of a model on the CPU, one after the other where they are sharded. A collective.

    Args:
        model (`nn.Module`):
            The model.
        among (`set[int]`, *optional*):
            The `id`s of the weights that are wanted; all by default.
    """
    weights = {}
    for name, weight in model.named_parameters():
        if among is not None and id(weight) not in among:
            continue
        with whole_weight(weight):
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[name] = whole.detach().cpu().clone()
    return weights


@torch.no_grad()
def spread_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """The reverse of [`gathered_weights`]: every process has all `weights`, and keeps its share."""
    for name, weight in model.named_parameters():
        if name not in weights:
            continue
        if isinstance(weight, DTensor):
            whole = weights[name].to(weight.device)
            weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))
            continue
        with whole_weight(weight, modified=True):
            weight.copy_(weights[name])


class WholeCheckpoints(SavesQuantization):
    """
    A transformers trainer whose checkpoints are whole or not there, and which ends well when it is asked to.

    - A checkpoint is written as [`written_aside`] says, and `resume_from_checkpoint` means what
      [`checkpoint_to_resume`] says.
    - A run that is finished trains no further when it is resumed.
    - SIGTERM ends training after the optimizer step that is under way, with a checkpoint, and then the process with
      the status `PREEMPTED` ([`~trl_ext.trainers.seams.preemption.Preemption`]).
    """

    ref_model: Any
    _aside: Path | None = None  # while it saves
    _to_push: str | None = None
    saved_step = 0  # of the last checkpoint of this process

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        limit_waiting(kwargs["args"])  # now, because processes wait for one that prepares the data
        super().__init__(*args, **kwargs)
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None:
                keep_weights_trainable(self.accelerator.unwrap_model(model))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with creation_of_repository(self):
            super().init_hf_repo(token, private)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        require_trainable(self)
        with preemption_of(self) as preemption, watching_processes(self):
            checkpoint = checkpoint_to_resume(self, resume_from_checkpoint)
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        preemption.leave_if_asked()
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed when it was finished
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        # Transformers would stop without an error, or, after less than an accumulation window, read on for ever
        read = getattr(self, "current_gradient_accumulation_steps", 0)  # micro-batches of the last window
        stopped_early = self.control.should_training_stop and read > 0
        require(
            self.state.global_step > 0 or has_length(self.train_dataset) or stopped_early,
            "train_dataset is a stream that ended before the first optimizer step: it has fewer rows than a step "
            "takes. Lower per_device_train_batch_size or gradient_accumulation_steps, or pass more rows.",
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not writes_parts(self):
            super().save_model(output_dir, _internal_call)
        elif _internal_call and parts_are_all(self):
            describe_parts(self, output_dir or str(self.args.output_dir))
        else:
            with whole_weights(self):
                super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with without_secrets(self.args):  # which transformers pickles beside the model
            super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = self._get_output_dir(trial)
        with written_aside(self, output_dir) as self._aside:
            try:
                directory = self._aside / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                if not self.args.save_only_model:
                    directory.mkdir(exist_ok=True)
                    self.write_own_files(directory)
                super()._save_checkpoint(model, trial)
            finally:
                aside, self._aside = self._aside, None
            best = self.state.best_model_checkpoint
            if best is not None and best.startswith(str(aside)):
                self.state.best_model_checkpoint = output_dir + best.removeprefix(str(aside))
                if self.args.should_save:  # written with the place aside
                    self.state.save_to_json(str(aside / Path(best).name / TRAINER_STATE))
        self.saved_step = self.state.global_step
        if self._to_push is not None:
            checkpoint, self._to_push = os.path.join(output_dir, self._to_push), None
            self._push_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # PEFT loads adapters in float32, also where TRL has cast them to bfloat16 for a quantized base
        policy: Any = self.model
        types = {name: weight.dtype for name, weight in policy.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, weight in policy.named_parameters():
            if weight.dtype != types.get(name, weight.dtype):
                weight.data = weight.data.to(types[name])

    def write_own_files(self, directory: Path) -> None:
        """Write into a new checkpoint what transformers doesn't. Every process makes the call."""
        moved = moved_reference(self)
        if moved is not None:
            model, among, name = moved
            weights = gathered_weights(model, among)
            if self.args.should_save:
                torch.save(weights, directory / name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        moved = None if checkpoint is None else moved_reference(self)
        if checkpoint is None or moved is None:
            return
        model, _, name = moved
        file = Path(checkpoint) / name
        if file.exists():
            spread_weights(model, read_plain(file))
        else:
            logger.warning(f"{checkpoint} has no refreshed reference: the run resumes with the one it began with.")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.hub_model_id is None:  # the Hub was out of reach
            return
        if self._aside is None:
            with without_secrets(self.args), push_of_checkpoint(self):
                copy_critic(self, checkpoint_folder)
                super()._push_from_checkpoint(checkpoint_folder)
        else:  # when it is in its place: the upload goes on in the background
            self._to_push = os.path.basename(checkpoint_folder)

    def _finish_current_push(self) -> None:
        wait_for_pushes(self)
        super()._finish_current_push()
