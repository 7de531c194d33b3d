"""
Trains a policy whose head is a weight of its own, under ZeRO-3: once with the model gathered whole to generate, once a
layer at a time: `untied_worker.py FOLDER`. Started by `test_deepspeed.py`.
"""

import sys
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from transformers import AutoModelForCausalLM

import trl_ext
from trl_ext.trainers.seams.whole_checkpoints import gathered_weights


# What makes the first pass with a fused head: the reference and the old policy, or the loss
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PPO": (trl_ext.PPOTrainer, {"critic": "head", "num_generations": 1, "num_iterations": 1}),
    "DAPO": (trl_ext.DAPOTrainer, {}),
}


def trained(method: str, folder: Path, whole: bool) -> dict[str, torch.Tensor]:
    trainer_class, own = METHODS[method]
    settings = {"per_device_train_batch_size": 4, "ds3_gather_for_generation": whole, "optim": "sgd", **own}
    policy = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    trainer = tiny.trainer(trainer_class, folder / "run", tiny.low_ids, {"model": policy}, **settings)
    head = trainer.model.get_output_embeddings().weight
    assert head is not trainer.model.get_input_embeddings().weight
    trainer.train()
    assert not head.ds_persist
    return gathered_weights(trainer.accelerator.unwrap_model(trainer.model))


def main(folder: Path) -> None:
    before = tiny.qwen2(tie_word_embeddings=False).state_dict()
    for method in METHODS:
        whole, by_layer = (trained(method, folder, on) for on in (True, False))
        for name, weight in whole.items():
            torch.testing.assert_close(by_layer[name], weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(whole["lm_head.weight"], before["lm_head.weight"])
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
