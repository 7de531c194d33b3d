"""
One completion, with everything TRL needs to go on as if it had just generated it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Rollout:
    """
    A scored completion before any padding.

    Args:
        row (`dict`):
            The data set row it came from, with the extra fields of a `rollout_func`.
        prompt (`str` or `list[dict]`):
            The prompt as TRL prepared it (images and observations included).
        prompt_ids, completion_ids (`list[int]`):
            Token ids.
        tool_mask (`list[int]`, *optional*):
            1 on tokens the policy wrote, 0 on tokens that a tool or an environment wrote.
        completion (`str` or `list[dict]`):
            The completion as the reward functions saw it.
        logprobs (`list[float]`, *optional*):
            Sampling log-probabilities, where the generation backend gives them.
        images, tool_images (`list`, *optional*):
            Images of the prompt and of the tools.
        extra_logs (`dict`):
            What the reward functions logged about this completion (`log_extra`).
        step_rewards (`dict`):
            Rewards by step ([`~trl_ext.rewards.steps.StepRewards`]), for each function that returned them, by its
            place among the functions.
    """

    row: dict[str, Any]
    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    tool_mask: list[int] | None
    completion: Any
    logprobs: list[float] | None
    images: list[Any] | None
    tool_images: list[Any] | None
    extra_logs: dict[str, Any] = field(default_factory=dict)
    step_rewards: dict[int, float] = field(default_factory=dict)


@dataclass
class ScoredRound:
    """
    One round of generation.

    Args:
        rollouts (`list[Rollout]`):
            The completions of this rank, groups side by side in global order.
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of the completions of all ranks, in global order, NaN = not applicable.
    """

    rollouts: list[Rollout]
    rewards: torch.Tensor


@dataclass
class ScoredGroups:
    """
    Completions that were generated and scored without training on them.

    Args:
        rewards (`torch.Tensor` of shape `(P, G, F)`):
            Rewards of G completions for each of P prompts by F functions, the same on every rank; NaN = not
            applicable.
        reward_func_names (`list[str]`):
            Names of the functions.
        generated_tokens (`int`):
            Completion tokens of all ranks.
        rollouts (`list[Rollout]`):
            The completions of this rank, groups side by side in global order.
    """

    rewards: torch.Tensor
    reward_func_names: list[str]
    generated_tokens: int
    rollouts: list[Rollout]


# What TRL's `_generate` returns.
Generation = tuple[list[list[int]], list[list[int]], Any, list[Any], Any, dict[str, Any], Any, list[Any]]


def _optional(values: Any, index: int) -> Any:
    return values[index] if values else None


def rollouts_of(rows: list[dict[str, Any]], prompts: list[Any], generation: Generation) -> list[Rollout]:
    """
    Take apart what TRL's `_generate` returned. The extra fields of a `rollout_func` are merged into `rows` in place,
    where reward functions look for them.
    """
    prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = generation
    for name, values in extra_fields.items():
        for i, row in enumerate(rows):
            row[name] = values[i] if isinstance(values, list) else values
    return [
        Rollout(
            row=rows[i],
            prompt=prompts[i],
            prompt_ids=prompt_ids[i],
            completion_ids=completion_ids[i],
            tool_mask=_optional(tool_mask, i),
            completion=completions[i],
            logprobs=_optional(logprobs, i),
            images=_optional(images, i),
            tool_images=_optional(tool_images, i),
        )
        for i in range(len(rows))
    ]


def generation_of(logged: list[Rollout], trained: list[Rollout]) -> Generation:
    """
    The reverse of [`rollouts_of`]: what `_generate` returns so that TRL trains on `trained`, and logs `logged`.

    Args:
        logged (`list[Rollout]`):
            One rollout per row of this rank, each completion once: TRL only logs and scores their texts.
        trained (`list[Rollout]`):
            One rollout per row of this rank, copies included: these become tensors.
    """

    def column(name: str, missing: Any = None) -> list[Any] | None:
        values = [getattr(rollout, name) for rollout in trained]
        if all(value is None for value in values):
            return None
        return [missing(rollout) if value is None else value for rollout, value in zip(trained, values, strict=True)]

    images = column("images", missing=lambda rollout: None)
    if images is None and any({"image", "images"} & rollout.row.keys() for rollout in trained):
        images = [None] * len(trained)  # else TRL would go back to the images of the rows as they were dealt
    return (
        [rollout.prompt_ids for rollout in trained],
        [rollout.completion_ids for rollout in trained],
        column("tool_mask", missing=lambda rollout: [1] * len(rollout.completion_ids)),
        [rollout.completion for rollout in logged],
        column("logprobs", missing=lambda rollout: [float("nan")] * len(rollout.completion_ids)),
        {},
        images,
        column("tool_images", missing=lambda rollout: []) or [],
    )


def joined_generation(chunks: list[Generation]) -> Generation:
    """What `_generate` would have returned for several chunks of prompts at once."""

    def column(index: int, missing: Callable[[list[int]], Any] = lambda completion_ids: None) -> Any:
        """A chunk may lack what others have: images, for one."""
        parts: list[Any] = [chunk[index] for chunk in chunks]
        if not any(parts):
            return parts[0]
        return [value for chunk, part in zip(chunks, parts, strict=True) for value in part or map(missing, chunk[1])]

    extra_fields = {
        name: [value for chunk in chunks for value in chunk[5][name]] if isinstance(first, list) else first
        for name, first in chunks[0][5].items()
    }
    return (
        column(0),
        column(1),
        column(2, missing=lambda completion_ids: [1] * len(completion_ids)),
        column(3),
        column(4, missing=lambda completion_ids: [float("nan")] * len(completion_ids)),
        extra_fields,
        column(6),
        column(7, missing=lambda completion_ids: []),
    )
