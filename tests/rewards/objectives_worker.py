"""Trains two steps with a constraint, on two processes: `objectives_worker.py OUTPUT`, under torchrun."""

import os
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from trl_ext import GRPOTrainer
from trl_ext.rewards.objectives import RewardConstraint, RewardObjectives


def rank(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(os.environ["RANK"])] * len(completion_ids)


def main(output_dir: Path) -> None:
    trainer = tiny.trainer(GRPOTrainer, output_dir, [tiny.low_ids, rank], max_steps=2)
    constraint = RewardConstraint("rank", floor=1.0, learning_rate=0.25)
    objectives = RewardObjectives(constraints=[constraint]).attach(trainer)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    torch.save(objectives.multipliers, output_dir / f"{trainer.accelerator.process_index}.pt")
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
