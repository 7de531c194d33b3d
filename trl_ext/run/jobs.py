"""
A run from the command line as a job for the planner: what its arguments and its data say of memory.
"""

from collections.abc import Mapping
from typing import Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS

from ..planner.job import Job
from ..planner.layouts import Layout
from ..planner.shapes import Shape, find_shape
from ..rewards.adapter import AdapterReward
from ..rewards.implicit import IMPLICIT_REWARD
from ..trainers.dapo import DAPOTrainer
from ..trainers.dpo import DPOTrainer
from ..trainers.dupo import DUPOTrainer
from ..trainers.grpo import GRPOTrainer
from ..trainers.gspo import GSPOTrainer
from ..trainers.ppo import PPOTrainer
from ..trainers.rloo import RLOOTrainer
from .lengths import Lengths
from .machine import NotPlanned, Spread


METHODS: dict[type, str] = {
    # The planner's name of a method, by the trainer's class or the nearest one that it extends
    DPOTrainer: "dpo",
    PPOTrainer: "ppo",
    DAPOTrainer: "dapo",
    DUPOTrainer: "dupo",
    GSPOTrainer: "gspo",
    RLOOTrainer: "rloo",
    GRPOTrainer: "grpo",
}
OPTIMIZERS = {
    # The planner's name of an optimizer, by TRL's
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "sgd": "sgd",
}


def method_of(trainer_class: type) -> str:
    """The planner's name of a trainer's method. Raises [`NotPlanned`] if it knows none."""
    found = next((METHODS[kind] for kind in trainer_class.__mro__ if kind in METHODS), None)
    if found is None:
        raise NotPlanned(f"the planner doesn't know {trainer_class.__name__}")
    return found


def job_of_run(
    trainer_class: type,
    settings: Mapping[str, Any],
    training_args: Any,
    model_args: Any,
    lengths: Lengths,
    layout: Layout,
    spread: Spread,
) -> Job:
    """
    The job of a run.

    Args:
        trainer_class (`type`):
            Its trainer.
        settings (`Mapping[str, Any]`):
            Arguments that the trainer is about to get.
        training_args ([`~trl_ext.GRPOConfig`] or [`~trl_ext.DPOConfig`]):
            Its configuration, as it is on the layout.
        model_args ([`~trl.ModelConfig`]):
            How its model is loaded.
        lengths ([`Lengths`]):
            Of its rows.
        layout ([`~trl_ext.planner.layouts.Layout`]):
            The GPUs.
        spread ([`Spread`]):
            How the run is spread over them.

    Returns:
        [`~trl_ext.planner.job.Job`]: in which no two completions share their prompt.

    Raises:
        NotPlanned: if the run has something that the planner doesn't know.
        ValueError: if the planner refuses the job.
    """
    method, model = method_of(trainer_class), find_shape(model_args.model_name_or_path)
    has_adapter = bool(model_args.use_peft)
    _check_known(training_args, model_args)
    given: dict[str, Any] = {
        "lora_r": model_args.lora_r if has_adapter else 0,
        "lora_target_modules": _targets(model_args, model) if has_adapter else "all-linear",
        "quantization": _quantization(model_args),
        "dtype": _dtype(model_args, model),
        "per_device_train_batch_size": training_args.per_device_train_batch_size,
        "gradient_checkpointing": bool(training_args.gradient_checkpointing),
        "optimizer": OPTIMIZERS[str(training_args.optim.value)],
        "strategy": spread.strategy,
        "offload": spread.offload,
    }
    own = _of_pairs if method == "dpo" else _of_rollouts
    given |= own(settings, training_args, lengths, model, "adapter" if has_adapter else "model")
    return Job(method, model, layout, **given)


def _check_known(training_args: Any, model_args: Any) -> None:
    unknown = {
        "bf16=False": not training_args.bf16,
        "load_in_8bit": model_args.load_in_8bit,
        "use_dora": model_args.use_peft and model_args.use_dora,
        "lora_target_parameters": model_args.use_peft and model_args.lora_target_parameters,
        "lora_modules_to_save": model_args.use_peft and model_args.lora_modules_to_save,
        f"optim={training_args.optim.value}": training_args.optim.value not in OPTIMIZERS,
        "activation_offloading": getattr(training_args, "activation_offloading", False),
    }
    found = [name for name, is_set in unknown.items() if is_set]
    if found:
        raise NotPlanned(f"the planner doesn't know {', '.join(found)}")


def _targets(model_args: Any, model: Shape) -> str | tuple[str, ...]:
    targets = model_args.lora_target_modules
    if targets is None:
        targets = USUAL_TARGETS.get(model.config.model_type)
    if targets is None:
        raise NotPlanned(f"PEFT names no modules of {model.config.model_type} for adapters")
    return targets if isinstance(targets, str) else tuple(targets)


def _quantization(model_args: Any) -> str | None:
    if not model_args.load_in_4bit:
        return None
    return "4bit_nested" if model_args.use_bnb_nested_quant else "4bit"


def _dtype(model_args: Any, model: Shape) -> str:
    name = str(model.config.dtype if model_args.dtype == "auto" else model_args.dtype).removeprefix("torch.")
    return "bfloat16" if name in ("bfloat16", "float16") else "float32"  # as TRL loads what says nothing


def _of_pairs(settings: Any, config: Any, lengths: Lengths, model: Shape, beside: str) -> dict[str, Any]:
    """What a job has of a trainer of pairs."""
    tokens = max(2, min(lengths.longest_row, config.max_length or lengths.longest_row))
    prompt = min(max(1, lengths.longest_prompt), tokens - 1)
    return {
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "reference": None if config.precompute_ref_log_probs else beside,
        "prompt_tokens": prompt,
        "completion_tokens": tokens - prompt,
    }


def _of_rollouts(settings: Any, config: Any, lengths: Lengths, model: Shape, beside: str) -> dict[str, Any]:
    """What a job has of a trainer that samples."""
    weights = (config.beta, getattr(config, "kl_coef", 0.0))
    chunks = config.generation_chunks if config.rewards_in_flight is not None else 1
    found: dict[str, Any] = {
        # Micro-batches for which completions are generated at once, of one optimizer step or several
        "gradient_accumulation_steps": max(1, config.steps_per_generation // chunks),
        "updates_per_generation": 1,
        "reference": beside if any(weights) else None,
        "prompt_tokens": max(1, lengths.longest_prompt),
        "completion_tokens": config.max_completion_length,
        "num_generations": config.num_generations or 1,
    }
    if getattr(config, "critic", None) is not None:
        found |= _critic(settings, config, model)
    if config.use_vllm:
        found["vllm"] = config.vllm_mode
        if config.vllm_mode == "colocate":
            names = ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode")
            found |= {name: getattr(config, name) for name in names}
    return found | _reward(settings, beside)


def _critic(settings: Any, config: Any, model: Shape) -> dict[str, Any]:
    of_critic = settings.get("value_model")
    if of_critic is None:
        return {"critic": config.critic, "critic_head": config.critic_head or "linear"}
    own = find_shape(str(of_critic), "value_model_name_or_path")
    if _size(own) != _size(model):
        raise NotPlanned(f"the critic, {of_critic}, is larger or smaller than the policy")
    return {"critic": "model"}


def _size(shape: Shape) -> tuple[int, ...]:
    text = shape.config.get_text_config()
    return text.hidden_size, text.num_hidden_layers, text.vocab_size


def _reward(settings: Any, beside: str) -> dict[str, Any]:
    funcs = settings["reward_funcs"]
    rewards = [*(funcs if isinstance(funcs, list) else [funcs]), settings.get("reward_model")]
    learned = [reward for reward in rewards if isinstance(reward, str | AdapterReward)]
    if not learned:
        return {}
    if len(learned) > 1:
        raise NotPlanned("there are several reward models")
    (reward,) = learned
    if isinstance(reward, AdapterReward) or reward == IMPLICIT_REWARD:
        if beside != "adapter":
            raise NotPlanned("the reward is an adapter, and all weights are trained")
        return {"reward": "adapter"}
    return {"reward": "model", "reward_model": find_shape(reward, "reward_funcs")}
