"""
Roll-outs of a whole data set that outlive their process: every finished batch is a line in a file, and the same call
goes on behind the last of them.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from trl.trainer.utils import hash_module

from ..roles.trunk import gathered
from ..rollouts.rollout import ScoredGroups
from ..trainers.grpo import GRPOTrainer


# What the trainer says of sampling, and its configuration
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length")
SAMPLING_OF_ARGS = ("generation_kwargs", "chat_template_kwargs")
# Rows that are hashed together
ROWS = 1000


def roll_out_all(
    trainer: GRPOTrainer,
    dataset: Dataset,
    num_generations: int,
    batch_size: int,
    seed: int,
    read: Callable[[ScoredGroups], list[Any]],
    depends_on: dict[str, Any],
    partial_results: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """
    Rolls out every row, and keeps what `read` makes of it.

    Args:
        trainer ([`GRPOTrainer`]):
            A `trl_ext` trainer with the policy and the reward functions. Every process must make the call.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns the rewards need.
        num_generations (`int`):
            Completions for each row.
        batch_size (`int`):
            Rows per generation.
        seed (`int`):
            Seed of the sampling. The batch that starts at row i has `seed + i`, so that a continued roll-out draws
            what an uninterrupted one would have drawn.
        read (`Callable`):
            From the scored completions of a batch to one result for each row, as JSON takes it. Every process makes
            the call, and gets the same.
        depends_on (`dict`):
            What results depend on beside the policy, the rows, the sampling and the names of the reward functions.
        partial_results (`str` or `Path`, *optional*):
            File in which finished batches are kept. If it is there already, from a roll-out of the same, this one goes
            on where that stopped.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with (rows done, rows in all) after each batch.

    Returns:
        `list`: a result for each row, the same on every process.

    Raises:
        `ValueError`: if `partial_results` is from another roll-out.
    """
    writes = trainer.is_world_process_zero()
    results: list[Any] = []
    if partial_results is not None:
        identity = {
            "model": weights_key(trainer.accelerator.unwrap_model(trainer.model)),
            "rows": content_key(dataset),
            "sampling": {name: getattr(trainer, name) for name in SAMPLING}
            | {name: getattr(trainer.args, name) for name in SAMPLING_OF_ARGS},
            "reward_funcs": trainer.reward_func_names,
            "num_generations": num_generations,
            "batch_size": batch_size,
            "seed": seed,
            **depends_on,
        }
        identity = json.loads(json.dumps(identity, default=str))
        results = _continued(Path(partial_results), identity, writes)
    for start in range(len(results), len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = read(trainer.roll_out(rows, num_generations, seed=seed + start))
        results += batch
        if partial_results is not None and writes:
            with open(partial_results, "a") as file:
                file.write(json.dumps(batch) + "\n")
        if on_progress is not None:
            on_progress(len(results), len(dataset))
    return results


def weights_key(model: nn.Module) -> str:
    """
    Identity of a model by its weights, the same where ZeRO-3 spreads them: it takes one after the other together.
    Every process must make the call.
    """
    digest = hashlib.sha256()
    for parameter in model.parameters():
        alone = nn.ParameterList([parameter])
        with gathered(alone):
            digest.update(hash_module(alone).encode())
    return digest.hexdigest()


def content_key(dataset: Dataset) -> str:
    """
    Identity of a data set by what is in its rows, whichever process read them and from where. (Its fingerprint is
    random after a function that can't be pickled, and differs between two copies of the same file.)
    """
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(ROWS):
        digest.update(repr(table.to_pylist()).encode())
    return digest.hexdigest()


def _continued(path: Path, identity: dict[str, Any], writes: bool) -> list[Any]:
    """Results of finished batches, the same on every process: the main one reads the file and tells the others."""
    outcome: list[Any] = [None]
    if writes:
        try:
            outcome = [_open_partial(path, identity)]
        except ValueError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return list(outcome[0])


def _open_partial(path: Path, identity: dict[str, Any]) -> list[Any]:
    """Reads the file, or creates it. Its first line says what it belongs to, each further one holds a batch."""
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    if not whole:  # a process may have stopped before it had said what the file belongs to
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(identity) + "\n")
        return []
    header, *batches = whole.decode().splitlines()
    if json.loads(header) != identity:
        raise ValueError(
            f"`partial_results` is {path}, which holds another roll-out ({header.strip()}; this one is "
            f"{json.dumps(identity)}). Remove it or name another file."
        )
    # A line without its end was being written when the process stopped: that batch is done again
    os.truncate(path, len(whole))
    return [result for batch in batches for result in json.loads(batch)]
