"""Starts workers with DeepSpeed ZeRO on two processes without a GPU, and what a test says of ZeRO."""

import json
from pathlib import Path
from typing import Any

import yaml
from processes import run


# So that ZeRO-3 spreads weights as small as those here, and fetches them one after the other. By default it keeps them
# whole in every process
SPREAD = {"stage3_param_persistence_threshold": 10, "stage3_prefetch_bucket_size": 230}


def launch_with_zero(folder: Path, name: str, zero: dict[str, Any], *command: Any, timeout: float = 300.0) -> None:
    """
    Args:
        folder (`Path`):
            Where DeepSpeed's and Accelerate's files are written.
        name (`str`):
            What they are called.
        zero (`dict`):
            DeepSpeed's `zero_optimization`.
        command:
            The worker and its arguments.
        timeout (`float`, *optional*, defaults to 300.0):
            In seconds.
    """
    zero3 = zero["stage"] == 3
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settled = {"stage3_gather_16bit_weights_on_model_save": True, **SPREAD} if zero3 else {}
    # SGD beside offloading has to be allowed: DeepSpeed's Adam takes a minute to compile
    settings = {**dict.fromkeys(sizes, "auto"), "zero_force_ds_cpu_optimizer": False}
    own = folder / f"{name}.json"
    own.write_text(json.dumps({**settings, "zero_optimization": {**settled, **zero}}))
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(own), "zero3_init_flag": zero3},
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", file]
    run([*launcher, *command], {"DS_ACCELERATOR": "cpu"}, timeout=timeout)
