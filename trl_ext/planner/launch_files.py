"""The files of a plan: Accelerate's and DeepSpeed's, the recipe's configuration, and the line that starts it."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from ..errors import require
from .job import Job
from .layouts import GIB
from .models import count_numbers
from .phases import BUCKET, DEEPSPEED_LIVE
from .plan import Plan
from .text import describe, verdict


ACCELERATE, DEEPSPEED, LAUNCH, SERVE = "accelerate.yaml", "deepspeed.json", "launch.sh", "serve.sh"
OPTIM = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "sgd": "sgd"}
KL = 0.05  # the weight of a KL to a reference, where one is planned
DISTRIBUTED = {"none": "NO", "ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}


def _persistent(job: Job) -> int:
    """
    Numbers of the largest weight that ZeRO-3 keeps on every GPU. Gathering one takes a launch, however small it is: a
    layer has two weights of an adapter for each linear one, so that adapters stay, with norms and biases.
    """
    text = job.model.config.get_text_config()
    hidden = int(text.hidden_size)
    widest = max(hidden, int(getattr(text, "intermediate_size", None) or 4 * hidden))
    return max(10 * hidden, job.lora_r * widest)


def deepspeed_config(job: Job) -> dict[str, Any]:
    """DeepSpeed's configuration of a job. Types, batches and clipping are the trainer's arguments: "auto"."""
    numbers = count_numbers(job)
    stage = 3 if job.strategy == "zero3" else 2
    # Small enough that ZeRO-3 reduces while the backward pass goes on: one square weight, transformers' "auto"
    bucket = int(min(BUCKET, job.model.config.get_text_config().hidden_size ** 2)) if stage == 3 else int(BUCKET)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
    }
    if stage == 2:
        zero["allgather_partitions"] = True
        zero["allgather_bucket_size"] = int(BUCKET)
    else:
        live = int(max(DEEPSPEED_LIVE, 2 * numbers.layer, numbers.ends + numbers.layer))
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * bucket),
            "stage3_param_persistence_threshold": _persistent(job),
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    pinned = {"device": "cpu", "pin_memory": True}
    zero["offload_optimizer"] = pinned if job.offload != "none" else {"device": "none"}
    if stage == 3:
        zero["offload_param"] = pinned if job.offload == "all" else {"device": "none"}
    return {
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def accelerate_config(job: Job, deepspeed_file: str) -> dict[str, Any]:
    """Accelerate's configuration of a job, for the first machine."""
    assert job.strategy is not None
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": DISTRIBUTED[job.strategy],
        "machine_rank": 0,
        "main_training_function": "main",
        "num_machines": job.layout.nodes,
        "num_processes": job.layout.gpus,
        "rdzv_backend": "static" if job.layout.nodes == 1 else "c10d",
        "same_network": True,
        "use_cpu": False,
    }
    if job.is_deepspeed:
        config["deepspeed_config"] = {
            "deepspeed_config_file": deepspeed_file,
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": job.strategy == "zero3",
        }
        return config
    if job.strategy == "fsdp2":
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_cpu_ram_efficient_loading": job.quantization is None,
            "fsdp_offload_params": False,
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        }
    return config | {"mixed_precision": "bf16"}


def _what_no_recipe_does(job: Job) -> str | None:
    """What is planned and can't be asked of a recipe, in a sentence."""
    if job.reference == "model" and not job.is_full:
        return (
            "reference='model' with an adapter: the recipes take the policy without its adapters as reference. Plan "
            "with reference='adapter', or pass the trainer a model of its own from Python."
        )
    if job.method == "dpo" and job.reference is None:
        return "dpo without a reference: the recipe compares with one. Plan with reference='adapter' or 'model'."
    if job.share_prefixes and job.samples and job.per_device_train_batch_size > job.num_generations:
        return (
            f"share_prefixes has one prompt a micro-batch, but per_device_train_batch_size="
            f"{job.per_device_train_batch_size} is more than num_generations={job.num_generations}."
        )
    return None


def _rewards_and_reference(job: Job) -> dict[str, Any]:
    config: dict[str, Any] = {"kl_coef" if job.method == "ppo" else "beta": KL if job.reference is not None else 0.0}
    if job.reward is None:
        return config | {"reward_funcs": ["recipes/tasks/gsm8k.py:correct_answer"]}
    own = f"runs/reward_{Path(job.model.name).name}"
    named = own if job.reward_model is None else job.reward_model.weights
    return config | {"reward_model_name_or_path": named, "share_reward_base": job.reward == "adapter"}


def _vllm(job: Job) -> dict[str, Any]:
    if job.vllm == "none":
        return {}
    config: dict[str, Any] = {"use_vllm": True, "vllm_mode": job.vllm}
    if job.vllm == "colocate":
        config |= {
            "vllm_gpu_memory_utilization": job.vllm_gpu_memory_utilization,
            "vllm_tensor_parallel_size": job.vllm_tensor_parallel_size,
            "vllm_enable_sleep_mode": job.vllm_enable_sleep_mode,
            "vllm_max_model_length": job.tokens,
            "vllm_sync": job.vllm_sync,
        }
    return config


def recipe_config(job: Job) -> dict[str, Any]:
    """
    Arguments of the method's recipe, on data that the recipes have: the user's own take their place.

    Raises:
        ValueError: if something is planned that no argument of the recipe asks for.
    """
    obstacle = _what_no_recipe_does(job)
    require(obstacle is None, str(obstacle))
    config: dict[str, Any] = {
        "model_name_or_path": job.model.weights,
        "dtype": job.base_dtype if not job.is_deepspeed else "bfloat16",
    }
    if job.samples:
        config |= {
            "dataset_name": "openai/gsm8k",
            "dataset_config": "main",
            "prepare_row": "recipes/tasks/gsm8k.py:prepare_row",
            "max_completion_length": job.completion_tokens,
            "updates_per_generation": job.updates,  # what is generated at once is what was planned
            **_rewards_and_reference(job),
            **_vllm(job),
        }
        if job.method != "ppo" or job.share_prefixes:
            config["num_generations"] = job.num_generations
        if job.strategy == "zero3":
            config["ds3_gather_for_generation"] = bool(job.ds3_gather_for_generation)
    else:
        config |= {"dataset_name": "trl-lib/ultrafeedback_binarized", "max_length": job.tokens}
    if job.share_prefixes:
        config["share_prefixes"] = "always"
    if job.critic is not None:
        config["critic"] = job.critic
        if job.critic != "model":
            config["critic_head"] = job.critic_head
    if not job.is_full:
        targets = job.lora_target_modules
        config |= {"use_peft": True, "lora_r": job.lora_r, "lora_alpha": 2 * job.lora_r, "lora_dropout": 0.0}
        config["lora_target_modules"] = targets if isinstance(targets, str) else list(targets)
    if job.quantization is not None:
        config |= {"load_in_4bit": True, "use_bnb_nested_quant": job.quantization == "4bit_nested"}
    return config | {
        "optim": OPTIM[job.optimizer],
        "output_dir": f"runs/{job.method}_{Path(job.model.name).name}",
        "per_device_train_batch_size": job.per_device_train_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "gradient_checkpointing": job.gradient_checkpointing,
        "bf16": True,
        "learning_rate": 1.0e-6 if job.is_full else 1.0e-5,
    }


def as_yaml(config: dict[str, Any]) -> str:
    return str(yaml.safe_dump(config, sort_keys=False))


def comments(plan: Plan) -> str:
    """What was planned and what it takes, as comments."""
    peaks = [f"  {phase.name}: {phase.bytes / GIB:.1f} GiB a GPU" for phase in plan.phases]
    lines = [*describe(plan), *verdict(plan, None, None), *peaks, "Planned, not measured."]
    return "".join(f"# {line}\n" for line in lines)


_ABOUT_REWARD = {
    "adapter": "# The reward is an adapter on the policy's base: recipes/reward.py with use_peft trains it.\n",
    "model": "# The reward is a model of the policy's size: recipes/reward.py trains it.\n",
}


def serve_words(job: Job) -> list[str]:
    """The command that serves the policy's completions, on GPUs beside those of the layout."""
    words = ["trl", "vllm-serve", "--model", job.model.weights, "--max_model_len", str(job.tokens)]
    return [*words, "--tensor_parallel_size", str(job.vllm_tensor_parallel_size)]


def _for_shell(words: list[str]) -> str:
    return f'#!/bin/sh\n{shlex.join(words)} "$@"\n'


def write_files(plan: Plan, folder: Path) -> str:
    """
    Write the files of a plan.

    Args:
        plan ([`Plan`]):
            One that fits.
        folder (`Path`):
            Folder, which is made if it isn't there.

    Returns:
        `str`: the command that starts the run.

    Raises:
        ValueError: if something is planned that no argument of the recipe asks for. Nothing is written then.
    """
    job = plan.job
    arguments = recipe_config(job)
    folder.mkdir(parents=True, exist_ok=True)
    if job.is_deepspeed:
        (folder / DEEPSPEED).write_text(json.dumps(deepspeed_config(job), indent=2) + "\n", encoding="utf-8")
    about, config = comments(plan), folder / f"{job.method}.yaml"
    accelerate = as_yaml(accelerate_config(job, str(folder / DEEPSPEED)))
    (folder / ACCELERATE).write_text(about + accelerate, encoding="utf-8")
    config.write_text(
        about
        + "# Data, rewards and learning rate are examples: put yours in their place.\n"
        + (_ABOUT_REWARD.get(str(job.reward), "") if job.reward_model is None else "")
        + as_yaml(arguments),
        encoding="utf-8",
    )
    if job.vllm == "server":
        (folder / SERVE).write_text(_for_shell(serve_words(job)), encoding="utf-8")
    words = ["trl-ext", "run", job.method, "--accelerate_config", str(folder / ACCELERATE), "--config", str(config)]
    (folder / LAUNCH).write_text(_for_shell(words), encoding="utf-8")
    return shlex.join(words)
