"""
An engine with the face of vLLM's `LLM`, as far as TRL's colocated path needs it, which generates with transformers. It
is strict where vLLM is: weights must have names that it knows, and settings of sampling that it doesn't implement are
refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    """What TRL asks for. Only temperature, length and ends differ from vLLM's defaults here."""

    n: int
    temperature: float
    max_tokens: int
    logprobs: int
    repetition_penalty: float
    top_p: float
    top_k: int
    min_p: float
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        neutral = {"n": 1, "logprobs": 0, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        assert {name: getattr(self, name) for name in neutral} == neutral, "the stub only samples plainly"


@dataclass
class Logprob:
    logprob: float
    rank: int = 1


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]


@dataclass
class Request:
    prompt_token_ids: list[int]
    outputs: list[Completion]


def skew_of(token: int, position: int) -> float:
    """A number in [−1, 1] that tells a completion's tokens apart, so that they can be recognised by it."""
    return math.sin(12.9898 * token + 78.233 * position)


@dataclass
class StubLLM:
    """
    An engine with a model of its own, loaded from the folder that TRL names.

    Attributes:
        lengths (`list[list[int]]`):
            Tokens of the completions of each call.
        syncs (`int`):
            How often the weights were replaced.
        on_sync (`Callable`):
            Called when they were.
        asleep (`set[str]`):
            What it has put away: `"weights"`, which it loses, and `"kv_cache"`.
        naps (`int`):
            How often it slept.
        skew (`float`):
            How far the log-probabilities that it reports are from those that it samples with, see [`skew_of`].
    """

    model_path: str
    on_sync: Callable[[], None] = lambda: None
    syncs: int = 0
    lengths: list[list[int]] = field(default_factory=list)
    asleep: set[str] = field(default_factory=set)
    naps: int = 0
    skew: float = 0.0

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32).eval()
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(model_runner=runner)
        config = SimpleNamespace(max_model_len=self.model.config.max_position_embeddings)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker), model_config=config)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        assert "weights" not in self.asleep
        parameters = dict(self.model.named_parameters())
        for name, weight in weights:
            parameters[name].data.copy_(weight)

    @torch.no_grad()
    def sleep(self, level: int) -> None:
        """Level 2 discards the weights."""
        assert not self.asleep and level == 2
        self.naps, self.asleep = self.naps + 1, {"weights", "kv_cache"}
        for parameter in self.model.parameters():
            parameter.fill_(math.nan)

    def wake_up(self, tags: list[str]) -> None:
        assert self.asleep.issuperset(tags)
        self.asleep -= set(tags)

    def reset_prefix_cache(self) -> None:
        """TRL's last call of a weight sync."""
        self.syncs += 1
        self.on_sync()

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, use_tqdm: bool
    ) -> list[Request]:
        assert not self.asleep
        found = [self.complete(list(prompt["prompt_token_ids"]), sampling_params) for prompt in prompts]
        self.lengths.append([len(request.outputs[0].token_ids) for request in found])
        return found

    @torch.no_grad()
    def complete(self, prompt: list[int], params: SamplingParams) -> Request:
        ids, logprobs = list(prompt), []
        ends = {*params.stop_token_ids} | (set() if params.ignore_eos else {self.model.config.eos_token_id})
        while len(logprobs) < params.max_tokens and (not logprobs or ids[-1] not in ends):
            logps = (self.model(torch.tensor([ids])).logits[0, -1] / params.temperature).log_softmax(-1)
            token = int(torch.multinomial(logps.exp(), 1))
            ids.append(token)
            skewed = float(logps[token]) + self.skew * skew_of(token, len(logprobs))
            logprobs.append({token: Logprob(skewed)})
        return Request(prompt, [Completion(ids[len(prompt) :], logprobs)])
