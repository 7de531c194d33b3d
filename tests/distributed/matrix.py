"""
Every method with every engine: how a run is built, which engine it has, and which combinations are refused. Engines
are columns, methods with full weights or LoRA are rows. `matrix_worker.py` runs a column, `test_matrix.py` compares.

The first `COMPARED` steps are on completions that depend on the prompt and the place in its group, on nothing else,
and take whole generation batches, so that one process and two take the same steps. The step after that samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from distributed.worker import digest, rare_success, some_end
from distributed.zero import SPREAD
from peft import PeftModel, get_peft_model
from pipelines import dpo_then_ppo_worker as pipeline
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from trl_ext import (
    AdapterReward,
    DAPOTrainer,
    DPOConfig,
    DPOTrainer,
    DUPOTrainer,
    GSPOTrainer,
    PPOConfig,
    PPOTrainer,
)


COMPARED, STEPS = 2, 3
FULL, LORA = "full", "LoRA"
ALONE = "one process"  # what all engines are compared with
PAIRS, PIPELINE = "DPO", "DPO then PPO"


@dataclass(frozen=True)
class Engine:
    """
    An engine, and what tells it.

    Args:
        launched (`dict`, *optional*):
            What DeepSpeed's file says of ZeRO; `None`: it is started with torchrun.
        is_it (`Callable[[Any], bool]`):
            Whether a trainer that has trained was on this engine.
        fsdp (`dict[str, str]`):
            Variables for Accelerate's plugin beside those of `fsdp_worker.py`.
    """

    launched: dict[str, Any] | None
    is_it: Callable[[Any], bool]
    fsdp: dict[str, str] = field(default_factory=dict)


def _is_zero(stage: int, offloads: bool, trainer: Any) -> bool:
    wrapped, parameters = trainer.model_wrapped, list(trainer.model.parameters())
    few = SPREAD["stage3_param_persistence_threshold"]
    spread = [hasattr(weight, "ds_id") and weight.ds_persist == (weight.ds_numel <= few) for weight in parameters]
    offloaded = [
        getattr(wrapped.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer", "offload_param")
    ]
    return (
        type(wrapped).__name__ == "DeepSpeedEngine"
        and wrapped.zero_optimization_stage() == stage
        and (all(spread) if stage == 3 else not any(spread))
        and sum(offloaded) == (stage - 1) * offloads  # the optimizer's state, and under ZeRO-3 the weights too
    )


def _is_fsdp(trainer: Any) -> bool:
    whole = [weight for weight in trainer.model.parameters() if not isinstance(weight, DTensor)]
    return isinstance(trainer.model_wrapped, FSDPModule) and not whole


CPU = {"device": "cpu"}
ENGINES = {
    "DDP": Engine(None, lambda trainer: isinstance(trainer.model_wrapped, DistributedDataParallel)),
    "ZeRO-2": Engine({"stage": 2}, partial(_is_zero, 2, False)),
    "ZeRO-2, offload": Engine({"stage": 2, "offload_optimizer": CPU}, partial(_is_zero, 2, True)),
    "ZeRO-3": Engine({"stage": 3}, partial(_is_zero, 3, False)),
    "ZeRO-3, offload": Engine(
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, partial(_is_zero, 3, True)
    ),
    "FSDP2": Engine(None, _is_fsdp),
    # Checkpoints are in parts, as Accelerate has them by default
    "FSDP2, in parts": Engine(None, _is_fsdp, {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
}

REFRESHED = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}

# Methods, and what they take beside `settings`. Four groups of four completions a step; eight where copies are drawn,
# so that there are several live ones to draw from, for slots of both processes
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "DAPO, refill": (DAPOTrainer, {"max_refill_rounds": 3}),
    "DUPO": (DUPOTrainer, {"gradient_accumulation_steps": 4}),
    "GSPO": (GSPOTrainer, {"beta": 0.05, **REFRESHED}),
    "PPO, head": (PPOTrainer, {"critic": "head", "critic_trunk_grad": 0.5}),
    "PPO, adapter": (PPOTrainer, {"critic": "adapter"}),
    "PPO, model": (PPOTrainer, {"critic": "model"}),
}
METHODS = (*SAMPLING, PAIRS, PIPELINE)
ROWS = [(method, weights) for method in METHODS for weights in (FULL, LORA)]
CELLS = [(engine, *row) for engine in ENGINES for row in ROWS]

# Why a cell is no run: the error with which it is refused
REFUSED: dict[tuple[str, str, str], str] = {
    **{(engine, "PPO, adapter", FULL): "critic='adapter' is an adapter on the frozen base" for engine in ENGINES},
    **{(engine, PIPELINE, FULL): "`peft_config` is missing" for engine in ENGINES},
    **{(engine, PIPELINE, LORA): "FSDP wraps a model permanently" for engine in ENGINES if "FSDP" in engine},
}


def prepare(folder: Path) -> None:
    """What all runs start from: a policy, an adapter on it whose B is not zero, and a reward adapter on it."""
    tiny.reward_adapter(folder)
    torch.manual_seed(4)
    policy = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    get_peft_model(policy, pipeline.lora(init_lora_weights=False, lora_dropout=0.0)).save_pretrained(
        folder / "adapter"
    )


def half_live(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """About half of the prompts have variance."""
    rewards = zip(prompts, tiny.hashed(completion_ids), strict=True)
    return [reward if digest(prompt) % 2 else 0.0 for prompt, reward in rewards]


def policy_of(folder: Path, weights: str) -> Any:
    """A folder, from which the reference is loaded, too; or a model with its adapter, which is copied for it."""
    if weights == FULL:
        return str(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


# With momentum, so that there is a state to resume ([`with_momentum`])
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
SAVING = {"save_strategy": "steps", "save_steps": COMPARED}


def with_momentum(trainer: Any) -> Any:
    """A trainer whose optimizer, which has yet to be made, has momentum. No name of an optimizer stands for that."""
    trainer.optimizer_cls_and_kwargs = torch.optim.SGD, {"lr": trainer.args.learning_rate, "momentum": 0.5}
    return trainer


def build(method: str, weights: str, folder: Path, output: Path, processes: int, resumed: bool = False) -> Any:
    """
    A run of a cell.

    Args:
        method, weights (`str`):
            The row.
        folder (`Path`):
            What [`prepare`] made.
        output (`Path`):
            The run's own folder.
        processes (`int`):
            How many share a batch.
        resumed (`bool`):
            Whether it goes on from the step that samples.
    """
    steps = COMPARED if processes == 1 else STEPS
    saving = {"save_strategy": "no"} if processes == 1 else SAVING
    if method == PAIRS:
        return _pairs(weights, folder, output, 8 // processes, {"max_steps": steps, **SGD, **saving})
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8 // processes,
        "share_prefixes": False,  # one process and two would share different rows
        "max_steps": steps,
        **SGD,
        **saving,
    }
    if method == PIPELINE:
        return _pipeline(weights, folder, output, 8 // processes, settings)
    trainer_class, own = SAMPLING[method]
    is_ppo = trainer_class is PPOTrainer
    if is_ppo:
        own = {**own, "num_iterations": 1, "critic_learning_rate": 0.05, "kl_coef": 0.05}
    reward = [tiny.hashed if is_ppo or method == "GSPO" else half_live if method == "DUPO" else rare_success]
    if method == "PPO, adapter" and weights == LORA:  # four roles on one base
        reward.append(AdapterReward(folder / "reward"))
    arguments = {
        "model_init_kwargs": {"dtype": "float32"} if weights == FULL else None,
        "learning_rate": 0.05,
        **settings,
        **own,
    }
    output.mkdir(parents=True, exist_ok=True)
    given = {"rollout_func": None if resumed else some_end, "train_dataset": tiny.prompts(64)}
    return _seeded(trainer_class, output, reward, given, arguments, folder, weights)


def _seeded(
    trainer_class: Any, output: Path, reward: Any, given: Any, arguments: Any, folder: Path, weights: str
) -> Any:
    """The configuration comes first: from it transformers knows that ZeRO-3 is to spread what is loaded."""
    settled = {"updates_per_generation": 1, "soft_punish_cache": 0, "warmup_steps": 0, **arguments}
    config = trainer_class.config_class(**tiny.cpu_settings(output, **settled))
    policy = policy_of(folder, weights)
    torch.manual_seed(0)  # of a new critic
    return with_momentum(
        trainer_class(model=policy, reward_funcs=reward, args=config, processing_class=tiny.tokenizer(), **given)
    )


def _pairs(weights: str, folder: Path, output: Path, rows: int, settings: dict[str, Any]) -> Any:
    named = {"model_init_kwargs": {"dtype": "float32"}} if weights == FULL else {}
    given = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "learning_rate": 0.5}
    config = DPOConfig(**tiny.pair_settings(output, **given, **settings, **named))
    return with_momentum(
        DPOTrainer(
            policy_of(folder, weights), args=config, train_dataset=pipeline.pairs(), processing_class=tiny.tokenizer()
        )
    )


def _pipeline(weights: str, folder: Path, output: Path, rows: int, settings: dict[str, Any]) -> Any:
    """Given pairs, and PPO with a head and a KL to what DPO left: its adapter, copied."""
    dpo = {"per_device_train_batch_size": rows, "max_steps": COMPARED, "learning_rate": 0.5, **SGD}
    own = {"learning_rate": 0.05, "critic_learning_rate": 0.05, "num_iterations": 1, "updates_per_generation": 1}
    return pipeline.schedule(
        output,
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        reward_funcs=[tiny.hashed],
        dpo_args=pipeline.dpo_args(**dpo, save_strategy="no", disable_dropout=True),
        policy_args=PPOConfig(**tiny.cpu_settings("unused", **own, **settings)),
        policy_kwargs={"rollout_func": some_end},
        pairs=pipeline.pairs(),
        pair_settings={},
        fit_critic=0,
        held_out=None,
        reference="dpo",
        peft_config=None if weights == FULL else pipeline.lora(lora_dropout=0.0),
    )
