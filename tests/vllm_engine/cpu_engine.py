"""
vLLM's CPU build as TRL's colocated engine, for tests and benchmarks, in an environment of its own (`make setup-vllm`).
Imports vLLM.

Two things of it have to be told apart from a GPU's. It packs linear weights when it loads them and drops the
originals, so that TRL's weight sync finds nothing to write to; here it computes with the originals. And it computes in
bfloat16 unless told otherwise, where the policy of a test is in float32.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from trl.generation import vllm_generation


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm
from vllm.model_executor.layers import utils as vllm_layers


def keep_weights(layer: Any, remove_weight: bool) -> None:
    """Takes the place of vLLM's packing."""
    layer.cpu_linear = torch.nn.functional.linear


@contextmanager
def cpu_engines(
    shared: bool = True, dtype: str = "float32", max_num_seqs: int = 16
) -> Iterator[dict[tuple[Any, ...], Any]]:
    """
    Within this context, TRL's colocated engines are vLLM's CPU build.

    Args:
        shared (`bool`):
            Whether trainers that ask for the same engine get the same one, with the weights that the last one left in
            it. It takes seconds to start one. A trainer that relied on what the engine was loaded with would be found
            out.
        dtype (`str`):
            What the engine computes in.
        max_num_seqs (`int`):
            Completions that it generates at once. TRL asks for those of a generation batch; with one size for all,
            trainers can share an engine.

    Yields:
        `dict`: the engines by what was asked for.
    """
    before_llm, packing = vllm_generation.LLM, vllm_layers.dispatch_cpu_unquantized_gemm
    made: dict[tuple[Any, ...], Any] = {}

    def engine(**settings: Any) -> Any:
        settings |= {"dtype": dtype, "enforce_eager": True, "max_num_seqs": max_num_seqs}
        key = tuple(sorted((name, str(value)) for name, value in settings.items()))
        if not shared:
            key = (*key, len(made))
        if key not in made:
            made[key] = vllm.LLM(**settings)
        return made[key]

    before = dict(os.environ)
    vllm_generation.LLM, vllm_layers.dispatch_cpu_unquantized_gemm = engine, keep_weights
    try:
        yield made
    finally:
        vllm_generation.LLM, vllm_layers.dispatch_cpu_unquantized_gemm = before_llm, packing
        made.clear()
        gc.collect()
        # TRL tells vLLM its rank in variables that the next trainer would take for a launcher's
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def weights_of(engine: Any) -> Any:
    """The model inside an engine, whose weights TRL replaces."""
    return engine.llm_engine.model_executor.driver_worker.model_runner.model


def log_probabilities(engine: Any, ids: list[list[int]], **request: Any) -> torch.Tensor:
    """What an engine makes of each token after the first, `(N, T − 1)`."""
    params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False, **request)
    found = [
        [of[token].logprob for of, token in zip(o.prompt_logprobs[1:], row[1:], strict=True)]
        for o, row in zip(outputs, ids, strict=True)
    ]
    return torch.tensor(found)


def save_policy(folder: Path) -> str:
    """A tiny policy, with heads of the size that vLLM's CPU attention takes, in a folder with its tokenizer."""
    import tiny

    model = tiny.qwen2(hidden_size=64, intermediate_size=64, initializer_range=0.2)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 2.0  # so that lengths differ
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)
