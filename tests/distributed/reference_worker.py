"""
Makes trainers of a model in memory that ZeRO-3 has spread over two processes: `reference_worker.py OUTPUT`. Started by
`test_deepspeed.py` with `accelerate launch`.
"""

import math
import sys
from pathlib import Path
from typing import Any

import deepspeed
from datasets import Dataset
from transformers import AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

import trl_ext


def trainer(kind: str, output_dir: Path, change: bool, named: bool = True) -> Any:
    given: dict[str, Any]
    if kind == "dpo":
        pairs = {"prompt": ["w0 w1"] * 8, "chosen": [" w2"] * 8, "rejected": [" w3 w4"] * 8}
        args: Any = trl_ext.DPOConfig(**tiny.pair_settings(output_dir, max_steps=1, per_device_train_batch_size=2))
        given = {"train_dataset": Dataset.from_dict(pairs)}
    else:
        settings = {"per_device_train_batch_size": 4, "max_steps": 1, "beta": 0.1}
        args = trl_ext.GRPOConfig(**tiny.cpu_settings(output_dir, **settings))
        given = {"train_dataset": tiny.prompts(), "reward_funcs": tiny.hashed}
    model = AutoModelForCausalLM.from_pretrained(output_dir / "model")  # spread, because `args` are there
    weight = model.get_input_embeddings().weight
    assert hasattr(weight, "ds_id")
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if change:
            weight.data[7, 0] += 0.5
    if not named:
        model.config._name_or_path = ""
    trainers = {"dpo": trl_ext.DPOTrainer, "grpo": trl_ext.GRPOTrainer}
    return trainers[kind](model=model, args=args, processing_class=tiny.tokenizer(), **given)


def refused(*how: Any) -> str:
    try:
        trainer(*how)
    except ValueError as error:
        return str(error)
    return "not refused"


def main(output_dir: Path) -> None:
    for kind in ("grpo", "dpo"):
        same = trainer(kind, output_dir, False)
        assert same.is_deepspeed_enabled and same.accelerator.num_processes == 2
        same.train()
        log = same.state.log_history[0]
        distance = log["loss"] - math.log(2) if kind == "dpo" else log["kl"]
        assert abs(distance) < 1e-6, (kind, distance)
        said = refused(kind, output_dir, True)
        assert "The policy is not what" in said and str(output_dir / "model") in said, said
        said = refused(kind, output_dir, False, False)
        assert "doesn't say where it can be loaded from" in said, said
    tiny.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
