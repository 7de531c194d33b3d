"""
Fixtures with real engines of vLLM, and what they were asked for. Tests in this folder run in an environment of their
own (`make test-vllm`); elsewhere `tests/conftest.py` leaves them out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm_engine.cpu_engine import cpu_engines, log_probabilities, save_policy


IDS = [[5, 9, 4, 17, 8, 2], [7, 7, 11, 20, 2, 4]]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An engine loads its model, and its tokenizer, from a folder."""
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[Any, Any]]:
    """Engines in float32, shared by the trainers of a module."""
    with cpu_engines() as made:
        yield made


@dataclass
class Watched:
    """
    What a trainer asks of its engine.

    Attributes:
        calls (`list[int]`):
            Completions of each call of the engine.
        syncs (`int`):
            How often the engine got weights.
        differences (`list[float]`):
            After each sync, the largest difference between the log-probabilities of engine and policy.
        seen (`list[torch.Tensor]`):
            Those of the engine.
    """

    trainer: Any
    calls: list[int] = field(default_factory=list)
    syncs: int = 0
    differences: list[float] = field(default_factory=list)
    seen: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generation = self.trainer.vllm_generation
        self.synchronise, self.generate = generation.sync_weights, generation.generate
        generation.sync_weights, generation.generate = self.after_sync, self.counted

    def after_sync(self) -> None:
        self.synchronise()
        self.syncs += 1
        self.seen.append(log_probabilities(self.trainer.vllm_generation.llm, IDS))
        self.differences.append((self.seen[-1] - log_probabilities_of_policy(self.trainer)).abs().max().item())

    def counted(self, *args: Any, **kwargs: Any) -> Any:
        found = self.generate(*args, **kwargs)
        self.calls.append(len(found[1]))
        return found


@torch.no_grad()
def log_probabilities_of_policy(trainer: Any) -> torch.Tensor:
    """Of each token of `IDS` after the first, `(N, T − 1)`."""
    ids = torch.tensor(IDS, device=trainer.accelerator.device)
    logps = trainer.model(ids).logits[:, :-1].log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()


@pytest.fixture
def watched() -> type[Watched]:
    return Watched
