"""
The policy's hidden states on prompts, read in training without leaving a trace in it.

Prompts are read in chunks whose content doesn't depend on the number of processes, so that a prompt has the same
states however many there are. Every process makes equally many calls of the model, because sharded weights are
gathered in each.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ...roles.critic import Critic, base_model_of
from ...rollouts.prompt_features import PLAIN, Halves, Projection
from ...rollouts.prompt_forms import fault_of


logger = get_logger(__name__)

# A chunk has at most so many prompts, and so many tokens with padding unless it is a single prompt
CHUNK_PROMPTS, CHUNK_TOKENS = 32, 8192
PADDING = 0  # any token: what follows a prompt doesn't change its states


def obstacle_of(trainer: Any, rows: Sequence[dict[str, Any]]) -> str | None:
    """Why the prompts of a trainer can't be read; `None` if they can."""
    if trainer._is_vlm:
        return "the policy sees images"
    if trainer.environment_factories is not None:
        return "environments write the prompts"
    if trainer.rollout_func is not None and any(fault_of(row.get("prompt")) for row in rows):
        return "only rollout_func can read them"
    return None


def critic_to_read(trainer: Any) -> Critic | None:
    """A trainer's critic, if its values come from the policy's own pass. A model of its own needs another."""
    critic: Critic | None = trainer.critic
    return None if critic is None or critic.reads_token_ids else critic


def chunks_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where the chunks of prompts of these lengths start and end."""
    edges, longest = [0], 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        count = i - edges[-1] + 1
        if count > CHUNK_PROMPTS or (count > 1 and count * longest > CHUNK_TOKENS):
            edges.append(i)
            longest = length
    return list(pairwise([*edges, len(lengths)]))


def read_prompts(trainer: Any, rows: Sequence[dict[str, Any]], projection: Projection) -> tuple[Halves, int] | None:
    """
    Features of prompts. Must be called on every process with the same rows. Modes of modules and random states are
    what they were.

    Args:
        trainer ([`~trl_ext.GRPOTrainer`]):
            Whose policy reads the prompts.
        rows (`list[dict]`):
            Data set rows.
        projection ([`~trl_ext.rollouts.prompt_features.Projection`]):
            Makes features of states. The first call fits it to the first chunk.

    Returns:
        `tuple[np.ndarray, int]`: features of shape `(N, F)`, and the number of the prompts' tokens. `None` if they
        can't be read; a warning says why.
    """
    obstacle = obstacle_of(trainer, rows)
    if obstacle is None:
        ids, *_ = trainer._tokenize_prompts(copy.deepcopy([row["prompt"] for row in rows]))
        chunks = chunks_of([len(prompt) for prompt in ids])
        processes, here = trainer.accelerator.num_processes, trainer.accelerator.process_index
        first = None if projection.fitted else _read(trainer, ids[slice(*chunks[0])])
        if first is not None:
            projection.fit(first, PLAIN + (critic_to_read(trainer) is not None))
        if projection.fitted:
            found: list[tuple[int, Halves]] = []
            for start in range(0, len(chunks), processes):
                number = start + here
                read = _read(trainer, ids[slice(*chunks[number if number < len(chunks) else 0])])
                if number < len(chunks) and read is not None:
                    found.append((number, projection(read)))
            if processes > 1:
                found = sorted(gather_object(found), key=lambda numbered: numbered[0])
            return np.concatenate([features for _, features in found]), sum(map(len, ids))
        obstacle = "the policy returns no hidden states"
    logger.warning(f"Prompts are predicted without their hidden states: {obstacle}.")
    return None


@torch.no_grad()
def _read(trainer: Any, ids: list[list[int]]) -> torch.Tensor | None:
    """
    What is read of prompts `(N, 1 + 3 S)`, in float64: log tokens; and of the states of the middle layer, mean and
    standard deviation over the prompt, and the last one. With a critic to read, V after the prompt's last token comes
    second.
    """
    model, device = trainer.model, trainer.accelerator.device
    lengths = torch.tensor([max(len(prompt), 1) for prompt in ids])
    # On the right, where padding changes neither positions nor, in a causal model, what comes before it
    padded = torch.full((len(ids), int(lengths.max())), PADDING)
    for row, prompt in zip(padded, ids, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    mask = torch.arange(padded.size(1)) < lengths[:, None]
    policy = base_model_of(trainer.accelerator.unwrap_model(model))
    last_logit = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(policy.forward).parameters else {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    critic, values = critic_to_read(trainer), []
    try:
        with ExitStack() as stack:
            if critic is not None:
                values = stack.enter_context(critic.reading())
            output = model(
                input_ids=padded.to(device),
                attention_mask=mask.long().to(device),
                output_hidden_states=True,
                use_cache=False,
                **last_logit,
            )
    finally:
        for module, mode in modes.items():
            module.training = mode
    layers = getattr(output, "hidden_states", None)
    if not layers:
        return None
    states = layers[len(layers) // 2].double().cpu()  # (N, L, S)
    counts, inside = lengths[:, None].double(), mask[:, :, None]
    mean = (states * inside).sum(dim=1) / counts
    spread = (((states - mean[:, None]) ** 2 * inside).sum(dim=1) / counts).sqrt()
    at_end = torch.arange(len(ids)), lengths - 1
    of_prompts = [v.double().cpu()[at_end].unsqueeze(1) for v in values]
    return torch.cat([counts.log(), *of_prompts, mean, spread, states[at_end]], dim=1)
