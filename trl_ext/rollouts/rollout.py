"""
A completion with everything that TRL needs to continue as if it had just generated it.
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
            The data set row of its prompt, with the extra fields that a `rollout_func` returned.
        prompt (`str` or `list[dict]`):
            The prompt as TRL prepared it (images and observations included).
        prompt_ids, completion_ids (`list[int]`):
            Token ids.
        tool_mask (`list[int]`, *optional*):
            1 on tokens that the policy wrote, 0 on tokens that a tool or an environment wrote.
        completion (`str` or `list[dict]`):
            The completion as the reward functions saw it.
        logprobs (`list[float]`, *optional*):
            Sampling log-probabilities in nats, if the generation backend returns them.
        images, tool_images (`list`, *optional*):
            Images of the prompt, and images that tools returned.
        extra_logs (`dict`):
            What the reward functions logged about this completion (`log_extra`).
        step_rewards (`dict`):
            Step rewards ([`~trl_ext.rewards.steps.StepRewards`]) of the functions that returned such, by the
            function's position among the reward functions.
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
            The completions of this rank, in global order. Those of a group are next to each other.
        rewards (`torch.Tensor` of shape `(N, F)`):
            Rewards of the completions of all ranks by F functions, in global order, NaN = not applicable.
    """

    rollouts: list[Rollout]
    rewards: torch.Tensor


@dataclass
class ScoredGroups:
    """
    Completions that were generated and scored without training on them.

    Args:
        rewards (`torch.Tensor` of shape `(P, G, F)`):
            Rewards of G completions for each of P prompts by F functions, the same on every rank, NaN = not
            applicable.
        reward_func_names (`list[str]`):
            Names of the functions.
        generated_tokens (`int`):
            Number of completion tokens on all ranks, without those that tools or environments wrote.
        rollouts (`list[Rollout]`):
            The completions of this rank, in global order. Those of a group are next to each other.
    """

    rewards: torch.Tensor
    reward_func_names: list[str]
    generated_tokens: int
    rollouts: list[Rollout]


# What TRL's `_generate` returns: prompt ids, completion ids, tool mask, completions, log-probabilities, extra fields,
# images, images of tools
Generation = tuple[list[list[int]], list[list[int]], Any, list[Any], Any, dict[str, Any], Any, list[Any]]


def _optional(values: Any, index: int) -> Any:
    return values[index] if values else None


def rollouts_of(rows: list[dict[str, Any]], prompts: list[Any], generation: Generation) -> list[Rollout]:
    """
    The rollouts in what TRL's `_generate` returned for these data set rows. The extra fields of a `rollout_func` are
    written into `rows` in place, because reward functions get them from there.
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
    The reverse of [`rollouts_of`]: what `_generate` has to return so that TRL trains on `trained` and logs `logged`.

    Args:
        logged (`list[Rollout]`):
            This rank's rollouts without copies. TRL logs their texts.
        trained (`list[Rollout]`):
            This rank's rollouts with copies. TRL makes tensors of them.
    """

    def column(name: str, missing: Any = None) -> list[Any] | None:
        values = [getattr(rollout, name) for rollout in trained]
        if all(value is None for value in values):
            return None
        return [missing(rollout) if value is None else value for rollout, value in zip(trained, values, strict=True)]

    images = column("images", missing=lambda rollout: None)
    if images is None and any({"image", "images"} & rollout.row.keys() for rollout in trained):
        images = [None] * len(trained)  # without this, TRL would use the images of the dealt rows
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
    """What `_generate` would have returned for the prompts of all chunks in one call."""

    def column(index: int, missing: Callable[[list[int]], Any] = lambda completion_ids: None) -> Any:
        """The values of all chunks. Some chunks may have no values, such as images."""
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
