"""
PPO with actor, critic, reward and reference as adapters on one base in 4 bits, on however many processes it was
started with: `trunk_worker.py FOLDER OUTPUT`. It counts the base weights that a process holds.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext
from trl_ext.roles.trunk import storages


ROLES = {"actor": "default", "critic": "critic", "reward": "reward", "reference": "ref"}


def base_weights(model: Any) -> tuple[int, int]:
    """How many 4-bit matrices, and how many embeddings of the base model are in memory, each storage once."""
    embedding = model.get_input_embeddings().weight
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    packed = [t for t in alive if t.dtype == torch.uint8 and t.dim() == 2]
    embeddings = [t for t in alive if t.shape == embedding.shape and t.dtype == embedding.dtype]
    return len(storages(packed)), len(storages(embeddings))


class Counts(TrainerCallback):
    """Counts when gradients are there, and when rewards are asked for."""

    __name__ = "counts"

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        self.model: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.found.append(base_weights(getattr(model, "module", model)))

    def __call__(self, completion_ids: Any, **kwargs: Any) -> list[float]:
        self.found.append(base_weights(self.model))
        return tiny.hashed(completion_ids)


def prepare(folder: Path) -> None:
    """A base, of sizes that bitsandbytes packs, and a reward adapter on it."""
    tiny.qwen2(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    tiny.reward_adapter(folder)


def build(folder: Path, output_dir: Path, counts: Counts) -> Any:
    """Three roles beside the actor, whose B is not zero."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=tiny.nf4())
    trainer = tiny.trainer(
        trl_ext.PPOTrainer,
        output_dir,
        [trl_ext.AdapterReward(folder / "reward"), counts],
        {"model": model, "peft_config": tiny.lora(), "callbacks": [counts]},
        critic="adapter",
        num_generations=1,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        max_steps=2,
    )
    counts.model = model
    return trainer


def main(folder: Path, output_dir: Path) -> None:
    counts = Counts()
    trainer = build(folder, output_dir, counts)
    told = trainer.roles.describe()
    policy = trainer.model
    expected = sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in policy.modules())
    before = base_weights(policy)
    small = {name: weight.detach().clone() for name, weight in policy.named_parameters() if "lora" in name}
    trainer.train()
    moved = {name for name, weight in policy.named_parameters() if name in small and not weight.equal(small[name])}
    rank = int(os.environ.get("RANK", "0"))
    found = {"roles": told, "expected": (expected, 1), "before": before, "during": counts.found, "moved": moved}
    torch.save(found | {"processes": trainer.accelerator.num_processes}, output_dir.with_suffix(f".{rank}.pt"))
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
