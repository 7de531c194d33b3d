"""
Samples completions for a whole data set, in a call that can be interrupted: every finished batch is written to a file
as one line, and the same call made again continues after the last line.
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


# Settings of sampling: attributes of the trainer, and of its configuration
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length", "eos_token_ids")
SAMPLING_OF_ARGS = ("generation_kwargs", "chat_template_kwargs")
# Number of rows that are hashed together
HASHED_ROWS = 1000


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
    Samples and scores completions for every row, and returns what `read` extracts from them.

    Args:
        trainer ([`GRPOTrainer`]):
            A trainer of `trl_ext` with the policy and the reward functions. Every process must make the call.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and the columns that the reward functions need.
        num_generations (`int`):
            Completions per row.
        batch_size (`int`):
            Rows per generation batch.
        seed (`int`):
            Seed of the sampling. The batch that starts at row i has the seed `seed + i`, so that an interrupted call
            and its continuation draw what an uninterrupted call would have drawn.
        read (`Callable`):
            From the scored completions of a batch to one result per row, of types that JSON has. Every process calls
            it, and must get the same result.
        depends_on (`dict`):
            Everything on which results depend, other than the policy, the rows, the sampling and the names of the
            reward functions.
        partial_results (`str` or `Path`, *optional*):
            A file to which the results of each finished batch are written. If the file exists and belongs to the same
            call, only missing batches are generated.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called after each batch with the number of finished rows and the number of all rows.

    Returns:
        `list`: one result per row, the same on every process.

    Raises:
        ValueError: if `partial_results` belongs to a different call.
    """
    writes = trainer.is_world_process_zero()
    results: list[Any] = []
    if partial_results is not None:
        identity = _identity_of(trainer, dataset, num_generations, batch_size, seed) | depends_on
        identity = json.loads(json.dumps(identity, default=str))
        results = _read_results(Path(partial_results), identity, writes)
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


def _identity_of(
    trainer: GRPOTrainer, dataset: Dataset, num_generations: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """What the file of a call says of it. Every process must make the call."""
    return {
        "model": weights_key(trainer.accelerator.unwrap_model(trainer.model)),
        "rows": content_key(dataset),
        "sampling": {name: getattr(trainer, name) for name in SAMPLING}
        | {name: getattr(trainer.args, name) for name in SAMPLING_OF_ARGS},
        "reward_funcs": trainer.reward_func_names,
        "num_generations": num_generations,
        "batch_size": batch_size,
        "seed": seed,
    }


def weights_key(model: nn.Module) -> str:
    """
    A hash of a model's weights. It is the same if ZeRO-3 shards them, and gathers one weight at a time. Every process
    must make the call.
    """
    digest = hashlib.sha256()
    for parameter in model.parameters():
        alone = nn.ParameterList([parameter])
        with gathered(alone):
            digest.update(hash_module(alone).encode())
    return digest.hexdigest()


def content_key(dataset: Dataset) -> str:
    """
    A hash of a data set's rows, the same in every process and for every copy of the data set. (The fingerprint of
    `datasets` is random after a function that can't be pickled, and differs between two copies of the same file.)
    """
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(HASHED_ROWS):
        digest.update(repr(table.to_pylist()).encode())
    return digest.hexdigest()


def _read_results(path: Path, identity: dict[str, Any], writes: bool) -> list[Any]:
    """Results of finished batches. The main process reads the file and broadcasts the results to all others."""
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
    """
    Reads the file, or creates it. The first line says to which call it belongs; each further line holds the results of
    one batch.
    """
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    if not whole:  # the process may have been stopped before it had written the first line
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(identity) + "\n")
        return []
    header, *batches = whole.decode().splitlines()
    if json.loads(header) != identity:
        raise ValueError(
            f"`partial_results` is {path}, which holds results of a different call ({header.strip()}; this one is "
            f"{json.dumps(identity)}). Remove the file, or name a different one."
        )
    # A line without its end was being written when the process was stopped, and its batch is generated again
    os.truncate(path, len(whole))
    return [result for batch in batches for result in json.loads(batch)]
