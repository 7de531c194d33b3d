"""
Real runs of trainers on a CPU for `planner_accuracy.py`, and what they hold and take, in bytes.

What is held is counted by storages: each once by its address, whoever refers to it. What a pass takes is the most
that is alive at once of what operations make in it ([`~trl_ext.trainers.seams.fake_passes.LiveBytes`], here on real
tensors).
"""

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from fsdp_on_cpus import force_fsdp
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TrainerCallback,
)

from trl_ext import (
    AdapterReward,
    DAPOConfig,
    DAPOTrainer,
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
)
from trl_ext.planner.job import Job
from trl_ext.planner.models import lora_config
from trl_ext.planner.shapes import Shape
from trl_ext.roles.critic import critic_of
from trl_ext.trainers.seams.fake_passes import LiveBytes, head_as_on_gpus


# Hidden size, MLP, layers, heads, heads of keys and values, vocabulary
SIZES = {"tiny": (64, 128, 6, 4, 2, 512), "100m": (768, 2048, 12, 12, 4, 16384)}
SEED = 0


def shape(size: str) -> Shape:
    """A model of that size with Qwen2's architecture."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Shape(size, config)


def tokenizer(vocabulary: int) -> Any:
    """A word is a token."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, vocabulary)}}
    found = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, padding_side="left", **special)


def write_models(folder: Path, model: Shape, job: Job) -> None:
    """The base, and what scores: an adapter on it, and a model of its own."""
    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_config(model.config)
    base.save_pretrained(folder / "base")
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    scorer.save_pretrained(folder / "reward_model")
    lora = lora_config(job)
    lora.task_type = "SEQ_CLS"
    get_peft_model(scorer, lora).save_pretrained(folder / "reward_adapter")
    for name in ("base", "reward_model", "reward_adapter"):
        tokenizer(model.config.vocab_size).save_pretrained(folder / name)


# Storages


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _places(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Where tensors begin and end, in order, without what overlaps: DeepSpeed keeps many in one storage, and views."""
    held = [_local(tensor) for tensor in tensors]
    places = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in held if tensor.numel())
    found: list[tuple[int, int]] = []
    for start, stop in places:
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of what tensors hold, each byte once."""
    return sum(stop - start for start, stop in _places(tensors))


def everything() -> list[torch.Tensor]:
    """All tensors of this process that Python knows of."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # others wrap these
    found = [thing for thing in gc.get_objects() if type(thing) in kinds and not thing.is_meta]
    # Gradients are objects of Python's only once they were looked at
    return found + [_local(tensor.grad) for tensor in found if tensor.is_leaf and tensor.grad is not None]


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of storages by address."""
    held = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


def _tensors_in(thing: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth and isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors_in(value, depth - 1)
    elif depth and isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors_in(value, depth - 1)


def held_by(trainer: Any) -> dict[str, int]:
    """Bytes that this process holds, by role, and what no role has (`others`)."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    critic = critic_of(policy)
    own = set() if critic is None else {id(w) for w in (*critic.trained_parameters(), *critic.parameters())}
    roles: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("base weights", "adapter", "critic", "reward", "reference", "gradients", "optimizer")
    }
    for name, weight in policy.named_parameters():
        role = "critic" if id(weight) in own else "base weights"
        if role != "critic" and "lora_" in name:
            role = "adapter" if weight.requires_grad else "reward"
        elif role != "critic" and "score" in name:
            role = "reward"
        roles[role].append(weight)
        quantized = getattr(weight, "quant_state", None)
        if quantized is not None:
            nested = quantized.state2
            roles[role] += [quantized.absmax, *([] if nested is None else [nested.absmax])]
        if weight.grad is not None:
            roles["gradients"].append(weight.grad)
    if trainer.ref_model is not None:
        roles["reference"] += trainer.accelerator.unwrap_model(trainer.ref_model).parameters()
    for func in getattr(trainer, "reward_funcs", []):
        model = getattr(func, "model", func)
        if isinstance(model, torch.nn.Module):
            roles["reward"] += [w for w in model.parameters() if id(w) not in {id(p) for p in policy.parameters()}]
    reward = getattr(getattr(trainer, "_reward_model", None), "model", None)
    if reward is not None:
        roles["reward"] += trainer.accelerator.unwrap_model(reward).parameters()
    optimizer = trainer.optimizer
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        zero = engine.optimizer
        roles["gradients"] += _tensors_in(getattr(zero, "averaged_gradients", {}))
        roles["gradients"] += _tensors_in(getattr(zero, "grad_partitions_flat_buffer", None))
        roles["optimizer"] += _tensors_in(getattr(zero, "single_partition_of_fp32_groups", []))
        roles["optimizer"] += _tensors_in(getattr(zero, "fp32_partitioned_groups_flat", []))
        optimizer = zero.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for kept in optimizer.state.values():
        roles["optimizer"] += [state for name, state in kept.items() if name != "step" and torch.is_tensor(state)]
    found = {role: nbytes(tensors) for role, tensors in roles.items()}
    found["others"] = sum(storages(everything()).values()) - sum(found.values())
    return {role: size for role, size in found.items() if size}


# Runs


@dataclass
class Found:
    """What a run held and took."""

    held: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    padded: dict[str, bool] = field(default_factory=dict)
    processes: int = 1


class Watch(TrainerCallback):
    """
    Measures the second micro-batch of a step, whose gradients have a place already, and what is held at its end.
    """

    def __init__(self, found: Found, passes: bool) -> None:
        self.found, self.passes = found, passes
        self.trainer: Any = None
        self._open: Any = None

    def follow(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.add_callback(self)
        self._measure(trainer, "_generate_single_turn", "generate")
        self._measure(trainer, "_get_per_token_logps_and_entropies", "passes", lambda: trainer._loss_inputs is None)
        self._measure(trainer, "_calculate_rewards", "score")
        backward = trainer.accelerator.backward

        def marked(*args: Any, **kwargs: Any) -> Any:
            if self._open is not None:
                live = self._open
                self.found.passes["update, kept"] = live.bytes
                self.found.passes["update, forward"] = live.peak
                live.reset_peak()
            return backward(*args, **kwargs)

        trainer.accelerator.backward = marked
        base = trainer.accelerator.unwrap_model(trainer.model)
        base.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("fused_lm_head"):
            name = "update" if torch.is_grad_enabled() else "passes"
            mask, labels = kwargs.get("attention_mask"), kwargs.get("labels", kwargs.get("shift_labels"))
            self.found.shapes[name] = (*kwargs["input_ids"].shape, labels.size(-1))
            self.found.padded[name] = mask is None or not bool(mask.bool().all())

    def _measure(self, trainer: Any, method: str, name: str, when: Callable[[], bool] = lambda: True) -> None:
        if not self.passes or not hasattr(trainer, method):
            return
        inner = getattr(trainer, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._open is not None or not when() or name in self.found.passes:
                return inner(*args, **kwargs)
            with LiveBytes(everything()) as live:
                result = inner(*args, **kwargs)
            self.found.passes[name] = live.peak
            return result

        setattr(trainer, method, measured)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is not None:  # its step comes before any callback, and clears gradients
            step = engine.step

            def watched(*args: Any, **kwargs: Any) -> Any:
                self._close()
                before = held_by(self.trainer)
                result = step(*args, **kwargs)
                after = held_by(self.trainer)  # the first step makes the optimizer's states
                self.found.held = before | {"optimizer": after["optimizer"]}
                return result

            engine.step = watched

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.passes:
            self._open = LiveBytes(everything())
            self._open.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(self.trainer, "deepspeed", None) is None:  # gradients are still there
            self.found.held = held_by(self.trainer)

    def _close(self) -> None:
        if self._open is not None:
            self.found.passes["update, backward"] = self._open.peak
            self._open.__exit__(None, None, None)
            self._open = None


def varied(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A number that differs between nearly all completions."""
    return [sum(token * 7**i for i, token in enumerate(ids[-4:])) % 101 / 101 for ids in completion_ids]


def _words(count: int, seed: int) -> str:
    return "".join(f"w{4 + (seed * 7 + i * 3 + i // 10) % 300} " for i in range(count))


def _rows(job: Job, count: int = 32) -> Dataset:
    """Prompts of the longest length and a little less, so that passes have padding; pairs likewise."""
    rows: dict[str, list[str]] = {"prompt": [_words(job.prompt_tokens - (i % 4 > 0), i) for i in range(count)]}
    if not job.samples:
        rows["prompt"] = [_words(job.prompt_tokens, i) for i in range(count)]
        # The end-of-sequence token is the last
        rows["chosen"] = [_words(job.completion_tokens - 1, 3 * i + 1) for i in range(count)]
        # Pairs of unequal length are padded; packed, they take as much less
        less = 1 if job.share_prefixes else 2
        rows["rejected"] = [_words(job.completion_tokens - less, 5 * i + 2) for i in range(count)]
    return Dataset.from_dict(rows)


def _settings(job: Job, output: Path, steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": True,
        "gradient_checkpointing": job.gradient_checkpointing,
        "per_device_train_batch_size": job.per_device_train_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "model_init_kwargs": {"dtype": job.dtype or ("float32" if job.is_full else "bfloat16")},
        "learning_rate": 1e-4,
        "max_steps": steps,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": SEED,
        "share_prefixes": "always" if job.share_prefixes else False,
    }
    if job.quantization is not None:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        found["model_init_kwargs"]["quantization_config"] = four_bits
    if not job.samples:
        return found | {"max_length": job.tokens}
    found |= {
        "num_generations": job.num_generations,
        "max_completion_length": job.completion_tokens,
        "shuffle_dataset": False,
        "fit_micro_batches": job.share_prefixes,
    }
    if job.strategy == "zero3":
        found["ds3_gather_for_generation"] = bool(job.ds3_gather_for_generation)
    if job.critic is not None:
        found["critic"] = job.critic
    if job.method == "dapo":
        found |= {"updates_per_generation": 1, "soft_punish_cache": 0, "warmup_steps": 0}
    return found


TRAINERS: dict[str, tuple[Any, Any]] = {
    "ppo": (PPOTrainer, PPOConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "dapo": (DAPOTrainer, DAPOConfig),
}


def build(job: Job, folder: Path, output: Path, steps: int) -> Any:
    """The trainer of a job, on the models in `folder`."""
    trainer_class, config_class = TRAINERS[job.method]
    args = config_class(**_settings(job, output, steps))  # before any model: DeepSpeed spreads those that come after
    given: dict[str, Any] = {} if job.is_full else {"peft_config": lora_config(job)}
    if job.samples:
        given["reward_funcs"] = [varied]
        if job.reward == "adapter":
            given["reward_funcs"].append(AdapterReward(folder / "reward_adapter"))
        elif job.reward == "model":
            given["reward_model"] = AutoModelForSequenceClassification.from_pretrained(
                folder / "reward_model", num_labels=1, dtype=args.model_init_kwargs["dtype"]
            )
    trainer = trainer_class(
        model=str(folder / "base"),
        args=args,
        train_dataset=_rows(job),
        processing_class=tokenizer(job.model.config.vocab_size),
        **given,
    )
    if job.samples:
        # No completion ends before its limit. As an argument this is refused: it changes what is learned
        trainer.generation_config.min_new_tokens = job.completion_tokens
    return trainer


def run(job: Job, folder: Path, output: Path, passes: bool = True) -> Found:
    """Trains, and says what was held and taken."""
    found = Found()
    torch.manual_seed(SEED)
    trainer = build(job, folder, output, 1)
    watch = Watch(found, passes)
    watch.follow(trainer)
    with head_as_on_gpus(picks=True), FastProducts():
        trainer.train()
    found.processes = trainer.accelerator.num_processes
    return found


class FastProducts(TorchDispatchMode):
    """
    Computes products of bfloat16 matrices in float32, and rounds them: processors without instructions for bfloat16
    are a hundred times slower in it. What the trainer sees, and what is counted, has the types and sizes that it asks
    for.
    """

    PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = func in self.PRODUCTS and all(
            type(given) in (torch.Tensor, torch.nn.Parameter) and given.dtype == torch.bfloat16 for given in args
        )
        if not plain:
            return func(*args, **(kwargs or {}))
        return func(*(given.float() for given in args), **(kwargs or {})).bfloat16()


# Processes


def quiet() -> None:
    """Before the first run: what was imported isn't looked through, and DeepSpeed compiles nothing."""
    import deepspeed

    # It reduces between processes in inference, never in training
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gc.collect()
    gc.freeze()


def leave() -> None:
    """Ends a process of several at once: gloo's threads and DeepSpeed's references outlive the interpreter."""
    sys.stdout.flush()
    os._exit(0)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def allow_fsdp_on_cpus() -> None:
    """[`force_fsdp`], with the settings that this benchmark measures."""
    force_fsdp()
    os.environ.update(FSDP2)
