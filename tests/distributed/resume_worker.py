"""Trains PPO with replay on however many processes it was started with, and resumes what another number wrote."""

import os
import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext
from trl_ext.trainers.seams.whole_checkpoints import MANIFEST


class Recorder(trl_ext.PPOTrainer):
    """Keeps the rows of every micro-batch: a prompt and a completion each."""

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        super().on_new_buffer(micro_batches)
        self.steps: list[list[tuple[Any, Any]]] = getattr(self, "steps", [])
        rows = []
        for batch in micro_batches:
            for name in ("prompt", "completion"):
                assert len(batch[f"{name}_ids"]) == 4 + 4 * bool(self.steps or self.state.global_step)
            for i in range(len(batch["completion_ids"])):
                parts = [batch[f"{name}_ids"][i][batch[f"{name}_mask"][i].bool()] for name in ("prompt", "completion")]
                rows.append(tuple(tuple(part.tolist()) for part in parts))
        self.steps.append(rows)


def train(output_dir: Path, processes: int, steps: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """Half of the rows of each step are replayed, once there are some."""
    config = trl_ext.PPOConfig(
        **tiny.cpu_settings(
            output_dir,
            **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 1},
            **{"num_iterations": 1, "max_steps": steps, "save_strategy": "steps", "save_steps": 1},
            **{"replay_ratio": 0.5, "fit_micro_batches": False},
        )
    )
    trainer = Recorder(
        model=tiny.stopping(),
        reward_funcs=tiny.hashed,
        args=config,
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return {"rows": trainer.steps, "ratios": [log["replay/ratio"] for log in tiny.history(trainer)]}


def refusal(checkpoint: Path, output_dir: Path) -> str:
    """What is said where the file of a process is out of sight, as on a machine with a disk of its own."""
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "trl_ext_process_1.pt").unlink()
    try:
        train(output_dir, 1, steps=4, checkpoint=checkpoint)
    except ValueError as error:
        return str(error)
    return ""


def main(directory: Path) -> None:
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    own, other = (directory / f"run_{n}" for n in (processes, 3 - processes))
    found: dict[str, Any] = {}
    if not own.exists():
        found["first"] = train(own, processes, steps=2)
    if other.exists():
        checkpoint = other / "checkpoint-2"
        found["resumed"] = train(directory / f"resumed_{processes}", processes, steps=4, checkpoint=checkpoint)
        found["error"] = refusal(checkpoint, directory / "refused") if processes == 1 else ""
    torch.save(found, directory / f"{'resumed' if other.exists() else 'first'}_{processes}_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    tiny.leave()
