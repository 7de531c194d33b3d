"""
Trains with DeepSpeed ZeRO on two processes and saves the model: `deepspeed_worker.py OUTPUT SELECTION [CHECKPOINT]`.
Started by `test_deepspeed.py` with `accelerate launch`.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext
from trl_ext.curriculum.partial import weights_key
from trl_ext.rollouts.prompt_features import Projection
from trl_ext.trainers.seams.prompt_states import read_prompts


class Unprojected(Projection):
    """Leaves what was read of prompts as it is, in float64."""

    def __call__(self, read: torch.Tensor) -> Any:
        return read.numpy()


def read(trainer: Any) -> torch.Tensor:
    """What is read of 70 prompts, in three chunks: an odd number, so that two processes don't read equally many."""
    found = read_prompts(trainer, list(tiny.ragged(70)), Unprojected(0))
    assert found is not None
    return torch.as_tensor(found[0])


def largest_difference(trainer: Any) -> float:
    """Of log-probabilities of a micro-batch, from passes that share prompts and from others."""
    batch, sharing = trainer._buffered_inputs[0], trainer.sharing
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    found = []
    for trainer.sharing in (sharing, None):
        with torch.no_grad():
            logps = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, batch["completion_ids"].size(1), compute_entropy=True
            )[0]
        found.append(logps * batch["completion_mask"])
    trainer.sharing = sharing
    return (found[0] - found[1]).abs().max().item()


def main(output_dir: Path, selection: str, checkpoint: str | None) -> None:
    trainer = trl_ext.DAPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.first_token_even,
        args=trl_ext.DAPOConfig(
            **tiny.cpu_settings(
                output_dir,
                per_device_train_batch_size=4,
                updates_per_generation=1,
                rollout_selection=selection,
                refill_draws="informed" if selection == "refill" else "blind",
                warmup_steps=0,
                share_prefixes="always",
                max_steps=3,
                save_strategy="steps",
                save_steps=2,
            )
        ),
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
    )
    assert trainer.is_deepspeed_enabled
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.sharing.packed_passes > 0 and trainer.sharing.cached_passes == 0
    assert largest_difference(trainer) < 1e-5
    rewards = trainer.roll_out([trainer.train_dataset[i] for i in range(3)], 2, seed=1).rewards
    states = read(trainer)
    target = output_dir / ("resumed" if checkpoint else "whole")
    trainer.save_model(str(target))
    model = trainer.accelerator.unwrap_model(trainer.model)
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            parameter.partition()  # which DeepSpeed doesn't with weights this small
            assert parameter.numel() == 0
    key = weights_key(model)
    if trainer.is_world_process_zero():
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        result = {"stage": stage, "counters": asdict(trainer.counters), "rewards": rewards, "key": key}
        result |= {"states": states, "chooser": trainer.run_state().get("outlook")}
        torch.save(result, target / "result.pt")
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
