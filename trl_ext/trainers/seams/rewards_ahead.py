"""
Rewards ahead: reward functions score the completions that exist while TRL generates further ones. A batch is generated
in chunks of whole groups, [`RewardsAhead`] gets the groups of each chunk at once, and TRL gets the rewards when it
calls the reward functions.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from ...rewards.ahead import RewardsAhead
from ...rollouts.generation_batch import Rows
from ...rollouts.rollout import Generation, joined_generation, rollouts_of
from ...rollouts.statistics import pool_rounds


if TYPE_CHECKING:
    from .grpo import GRPOSeams


logger = get_logger(__name__)


def rewards_ahead_of(trainer: "GRPOSeams") -> RewardsAhead | None:
    """What calls a trainer's reward functions in threads; `None` without `rewards_in_flight` and `reward_timeout`."""
    in_flight, timeout = trainer.args.rewards_in_flight, trainer.args.reward_timeout
    if in_flight is None and timeout is None:
        return None
    loop = getattr(trainer, "async_loop", None)  # TRL makes one if a reward function is async
    calls = in_flight or max(len(trainer.reward_guards), 1)
    return RewardsAhead(trainer.reward_guards, calls, timeout, loop, tolerates_errors=in_flight is not None)


def _completions_of_a_call(trainer: "GRPOSeams", completions: int) -> int:
    """One group; with a time limit alone all completions of this rank, as TRL calls reward functions."""
    if trainer.args.rewards_in_flight is None:
        return completions
    return trainer.num_generations if trainer.model.training else trainer.num_generations_eval


def generate_in_chunks(
    trainer: "GRPOSeams", generate: Callable[[list[Any]], Generation], prompts: list[Any]
) -> Generation:
    """
    Generate for `prompts` in chunks, and submit the groups of each chunk to the reward functions.

    Args:
        trainer ([`GRPOSeams`]):
            The trainer; `trainer.batch.rows` are the data set rows of the prompts.
        generate (`Callable`):
            TRL's `_generate`.
        prompts (`list`):
            This rank's prompts, one for each completion.

    Returns:
        What `generate` returns for all prompts.
    """
    size, rows = _completions_of_a_call(trainer, len(prompts)), trainer.batch.rows
    if trainer.rewards_ahead is None or len(prompts) % size:  # a group that spans processes is scored by TRL's call
        return generate(prompts)
    groups = len(prompts) // size
    count = min(trainer.args.generation_chunks, groups)
    cuts = [groups * i // count * size for i in range(count + 1)]
    chunks = []
    for start, stop in pairwise(cuts):
        chunks.append(generate(prompts[start:stop]))
        _submit(trainer, start, rows[start:stop], prompts[start:stop], chunks[-1])
    if count == 1:
        return chunks[0]
    processes = trainer.accelerator.num_processes
    sizes = [(stop - start) * processes for start, stop in pairwise(cuts)]
    pool_rounds(trainer._metrics["train" if trainer.model.training else "eval"], sizes)
    return joined_generation(chunks)


def _submit(trainer: "GRPOSeams", start: int, rows: Rows, prompts: list[Any], generation: Generation) -> None:
    """Call the reward functions on a chunk, whose first completion is number `start`, in the background."""
    assert trainer.rewards_ahead is not None
    rollouts = rollouts_of(rows, prompts, generation)
    # The arguments that TRL's `_calculate_rewards` passes to a reward function
    columns = {
        key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion", "completion_ids")
    }
    if trainer.environments is not None:
        columns["environments"] = trainer.environments[start : start + len(rows)]
    trainer.rewards_ahead.submit(
        {
            "prompts": prompts,
            "completions": [rollout.completion for rollout in rollouts],
            "completion_ids": [rollout.completion_ids for rollout in rollouts],
            **columns,
            "trainer_state": trainer.state,
            "log_extra": trainer._log_completion_extra,
            "log_metric": trainer._log_metric,
        },
        _completions_of_a_call(trainer, len(prompts)),
    )


def hand_rewards_to_trl(trainer: "GRPOSeams") -> None:
    """
    Wait for the submitted calls. When TRL calls the reward functions next, they return these rewards. Faults are
    logged and counted.
    """
    ahead, guards = trainer.rewards_ahead, trainer.reward_guards
    if ahead is None:
        return
    rewards = ahead.collect()
    if not guards or not rewards[0]:
        return
    for func, ready in zip(guards, rewards, strict=True):
        func.ready = ready
    for fault in ahead.faults:
        logger.warning(f"{fault.message}\nIts group has no reward from it.", main_process_only=False)
    counts = torch.tensor(ahead.faults_by_function(), device=trainer.accelerator.device)
    counts = trainer.accelerator.reduce(counts, reduction="sum")
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for func, count in zip(guards, counts.tolist(), strict=True):
        failed = metrics[f"rewards/{func.__name__}/failed_groups"]
        # The rounds of a batch are counted together
        failed.append((failed.pop() if trainer.batch.further else 0.0) + count)


def discard_rewards(trainer: "GRPOSeams") -> None:
    """Forget all submitted calls, so that a batch that failed leaves no rewards to the next one."""
    if trainer.rewards_ahead is None:
        return
    trainer.rewards_ahead.discard()
    for func in trainer.reward_guards:
        func.ready = None
