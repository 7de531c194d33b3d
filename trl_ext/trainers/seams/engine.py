"""
TRL's colocated vLLM engine: how it is kept awake, and what it is sent.

**Awake.** With `vllm_enable_sleep_mode`, TRL has the engine discard its weights after each call and sends all of them
again before the next. The rounds and chunks of one generation batch follow each other: [`awake`] has it sleep after
the last.

**The adapter alone.** TRL sends all weights, with the adapter merged into them; to merge, ZeRO-3 gathers the whole
model in every process. With `vllm_sync="adapter"`

- the engine that TRL makes is one that takes an adapter, and holds the base as it was loaded ([`taking_adapters`]);
- with each of TRL's weight syncs, the adapter's weights are gathered and written to a temporary folder, from where the
  engine takes them in place of the earlier ones, and TRL has no other weights to send ([`send_adapter_alone`]).
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from trl.generation.vllm_generation import VLLMGeneration

from ...roles.adapter_critic import ADAPTER_WEIGHTS
from ...roles.adapters import trained_adapter
from ..engine_checks import LARGEST_RANK


# Ranks that vLLM has buffers for
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, LARGEST_RANK)
ADAPTER_ID = 1


@contextmanager
def taking_adapters(rank: int | None) -> Iterator[None]:
    """
    While TRL constructs a trainer: its colocated engine is made to take an adapter.

    Args:
        rank (`int`, *optional*):
            Of the adapter. `None`: nothing changes.
    """
    holder: Any = sys.modules[VLLMGeneration.__module__]
    engine = getattr(holder, "LLM", None)
    if rank is None or engine is None:  # TRL says that vLLM isn't installed
        yield
        return
    buffers = min(size for size in ENGINE_RANKS if size >= rank)

    def made(**settings: Any) -> Any:
        llm = engine(**settings, enable_lora=True, max_loras=1, max_lora_rank=buffers)
        # TRL lets the engine discard its weights between generations, because it sends all of them again
        llm.sleep = partial(_sleep_keeping_weights, llm.sleep)
        return llm

    holder.LLM = made
    try:
        yield
    finally:
        holder.LLM = engine


@contextmanager
def awake(trainer: Any, wanted: bool) -> Iterator[None]:
    """
    Within this context, a colocated engine that was woken for a call stays awake for further ones. At the end it
    sleeps.

    Args:
        trainer (trainer of `trl_ext`):
            The trainer.
        wanted (`bool`):
            Whether there may be further calls. Otherwise nothing changes.
    """
    generation: Any = getattr(trainer, "vllm_generation", None)
    if not wanted or not getattr(generation, "enable_sleep_mode", False):
        yield
        return
    engine, generate = generation.llm, generation.generate
    sleep = engine.sleep
    levels: list[int] = []  # that TRL asked for

    def without_sleeping(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        finally:
            # Neither does TRL wake it again, nor send what it sends to an engine that has slept
            generation.enable_sleep_mode = not levels

    engine.sleep, generation.generate = (lambda level=1: levels.append(level)), without_sleeping
    try:
        yield
    finally:
        engine.sleep, generation.generate = sleep, generate
        generation.enable_sleep_mode = True
        if levels:
            sleep(level=levels[0])  # TRL has noted that it sleeps


def _sleep_keeping_weights(sleep: Any, level: int = 1) -> None:
    sleep(level=1)


def send_adapter_alone(trainer: Any) -> None:
    """
    Let TRL's weight syncs send the adapter that is trained, and let the engine generate with it.

    Args:
        trainer (trainer of `trl_ext`):
            Constructed within [`taking_adapters`].
    """
    from vllm.lora.request import LoRARequest

    generation = trainer.vllm_generation
    engine, synchronise = generation.llm, generation.sync_weights
    folder = tempfile.TemporaryDirectory(prefix="adapter-of-policy-")
    request = partial(LoRARequest, "policy", ADAPTER_ID, folder.name)

    @wraps(synchronise)
    def with_adapter() -> None:
        synchronise()
        write_adapter(generation, Path(folder.name))
        engine.llm_engine.add_lora(request(load_inplace=True))

    generation._iter_named_params = lambda: iter(())
    generation.sync_weights = with_adapter
    engine.generate = partial(engine.generate, lora_request=request())


def write_adapter(generation: Any, folder: Path) -> None:
    """Write the adapter that is trained as PEFT would. Every process must call it, and each has its own folder."""
    policy = generation.model
    adapter = trained_adapter(policy)
    weights = {name: weight for name, weight in policy.named_parameters() if adapter in name.split(".")}
    with torch.no_grad(), generation._dist.gather_params(list(weights.values())):
        whole = {
            name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().cpu().clone()
            for name, weight in weights.items()
        }
    state = get_peft_model_state_dict(policy, whole, adapter_name=adapter, save_embedding_layers=False)
    save_file({name: weight.contiguous() for name, weight in state.items()}, folder / ADAPTER_WEIGHTS)
    policy.peft_config[adapter].save_pretrained(str(folder))
