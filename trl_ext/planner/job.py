"""
What is to be planned: a method on a model, its roles, and the settings that decide memory. Names are those of TRL's
arguments where there is one.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import require, require_count, require_one_of
from ..trainers.engine_checks import VLLM_SYNCS
from .layouts import Layout
from .shapes import Shape


@dataclass(frozen=True)
class Method:
    """
    What the memory of a method depends on.

    Attributes:
        samples (`bool`):
            Whether completions are generated.
        critic (`bool`):
            Whether there is a critic.
        reference, reward_model (`bool`):
            Whether there is a reference, and a learned reward, by default.
        rows (`int`):
            Rows of a micro-batch for each example: a pair has two.
        updates (`int`):
            Optimizer steps that a generation batch is for, by default: `updates_per_generation` of its configuration.
    """

    samples: bool = True
    critic: bool = False
    reference: bool = False
    reward_model: bool = False
    rows: int = 1
    updates: int = 1


METHODS: dict[str, Method] = {
    "ppo": Method(critic=True, reference=True, reward_model=True),
    "dpo": Method(samples=False, reference=True, rows=2),
    "grpo": Method(),
    "dapo": Method(updates=16),
    "dupo": Method(updates=4),
    "gspo": Method(updates=4),
    "rloo": Method(reference=True),
    "reinforce": Method(),
    "maxrl": Method(),
}
STRATEGIES = {
    "none": "one process",
    "ddp": "every GPU has everything",
    "zero2": "DeepSpeed ZeRO-2: gradients and optimizer spread",
    "zero3": "DeepSpeed ZeRO-3: weights spread too",
    "fsdp2": "FSDP2: weights spread too",
}
CRITICS = ("head", "adapter", "model")
ROLES = {
    # What `--roles` stands for: the critic, the reward, the reference
    "shared": ("head", "adapter", "adapter"),
    "separate": ("model", "model", "model"),
}
QUANTIZATIONS = ("4bit", "4bit_nested")
OFFLOADS = ("none", "optimizer", "all")
VLLM_MODES = ("none", "colocate", "server")
ANY_LAYOUT = Layout("any", 1)


def roles_by_default(method: str, roles: str | None = None, is_full: bool = False) -> dict[str, str | None]:
    """
    What a method's critic, reward and reference are where nothing else is said.

    Args:
        method (`str`):
            One of [`METHODS`].
        roles (`str`, *optional*):
            One of [`ROLES`], which also asks for a learned reward and a reference where the method has none by
            default. `None`: `"shared"`, and only the roles that the method has.
        is_full (`bool`, *optional*, defaults to `False`):
            Whether all weights are trained. There is no base then that an adapter could share.
    """
    has = METHODS[method]
    critic, reward, reference = ROLES[roles or "shared"]
    asked = {
        "critic": critic if has.critic else None,
        "reward": reward if has.samples and (has.reward_model or roles is not None) else None,
        "reference": reference if has.reference or roles is not None else None,
    }
    return {role: "model" if kind == "adapter" and is_full else kind for role, kind in asked.items()}


@dataclass(frozen=True)
class Job:
    """
    What is to be planned.

    Args:
        method (`str`):
            One of [`METHODS`].
        model ([`Shape`]):
            The policy.
        layout ([`Layout`]):
            The GPUs.
        strategy (`str`, *optional*):
            One of [`STRATEGIES`]. `None`: the first that fits.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of the adapters. 0: all weights are trained.
        lora_target_modules (`str` or `tuple[str, ...]`, *optional*, defaults to `"all-linear"`):
            As in [`~trl.ModelConfig`].
        quantization (`str`, *optional*):
            Of the base weights: `"4bit"`, or `"4bit_nested"`, whose constants are quantized too.
        critic (`str`, *optional*):
            `"head"`, `"adapter"` or `"model"`. `None`: the method has none.
        critic_head (`str`, *optional*, defaults to `"linear"`):
            `"linear"` or `"mlp"`.
        reward (`str`, *optional*):
            `None`: functions; `"adapter"`: an adapter of the policy's base; `"model"`: a model of the policy's shape.
        reward_model ([`Shape`], *optional*):
            Shape of the reward model, if it is not the policy's.
        reference (`str`, *optional*):
            `None`, `"adapter"`: the base with the adapters off; `"model"`: weights of its own.
        prompt_tokens, completion_tokens (`int`, *optional*, defaults to `1024`):
            Longest prompt and completion. Every row is taken to be that long.
        per_device_train_batch_size (`int`, *optional*, defaults to `1`):
            Rows of a micro-batch; pairs for DPO.
        gradient_accumulation_steps (`int`, *optional*, defaults to `8`):
            Micro-batches of an optimizer step.
        updates_per_generation (`int`, *optional*):
            Optimizer steps for which a GPU generates at once. `None`: the method's default.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions of a prompt. Decides how many rows of a micro-batch share one, and nothing else.
        share_prefixes (`bool`, *optional*, defaults to `False`):
            Whether a micro-batch computes each prompt once: of a group, or of a pair.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            As in TRL.
        ds3_gather_for_generation (`bool`, *optional*):
            As in TRL, for ZeRO-3. `None`: if it fits.
        optimizer (`str`, *optional*, defaults to `"adamw"`):
            One of [`~trl_ext.planner.states.OPTIMIZERS`].
        offload (`str`, *optional*, defaults to `"none"`):
            What DeepSpeed keeps in the host's memory: `"optimizer"`, or `"all"`, weights too.
        vllm (`str`, *optional*, defaults to `"none"`):
            `"colocate"`: on the same GPUs; `"server"`: on others.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`), vllm_tensor_parallel_size (`int`,
        *optional*, defaults to `1`), vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            As in TRL.
        vllm_sync (`str`, *optional*, defaults to `"weights"`):
            As in [`~trl_ext.GRPOConfig`]: `"adapter"` gathers nothing of the base for vLLM.
        dtype (`str`, *optional*):
            Of the weights as they are loaded. `None`: `"bfloat16"`, and `"float32"`, as TRL loads, for weights that
            are trained in one process or under DDP.
    """

    method: str
    model: Shape
    layout: Layout
    strategy: str | None = None
    lora_r: int = 16
    lora_target_modules: str | tuple[str, ...] = "all-linear"
    quantization: str | None = None
    critic: str | None = None
    critic_head: str = "linear"
    reward: str | None = None
    reward_model: Shape | None = None
    reference: str | None = None
    prompt_tokens: int = 1024
    completion_tokens: int = 1024
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    updates_per_generation: int | None = None
    num_generations: int = 8
    share_prefixes: bool = False
    gradient_checkpointing: bool = True
    ds3_gather_for_generation: bool | None = None
    optimizer: str = "adamw"
    offload: str = "none"
    vllm: str = "none"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False
    vllm_sync: str = "weights"
    dtype: str | None = None

    def __post_init__(self) -> None:
        require_one_of("method", self.method, METHODS)
        require_one_of("strategy", self.strategy, (None, *STRATEGIES))
        require_one_of("quantization", self.quantization, (None, *QUANTIZATIONS))
        require_one_of("critic", self.critic, (None, *CRITICS))
        require_one_of("reward", self.reward, (None, "adapter", "model"))
        require_one_of("reference", self.reference, (None, "adapter", "model"))
        require_one_of("offload", self.offload, OFFLOADS)
        require_one_of("vllm", self.vllm, VLLM_MODES)
        require_one_of("vllm_sync", self.vllm_sync, VLLM_SYNCS)
        for name in (
            "prompt_tokens",
            "completion_tokens",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        ):
            require_count(name, getattr(self, name))
        require_count("lora_r", self.lora_r, 0)
        if self.updates_per_generation is not None:
            require_count("updates_per_generation", self.updates_per_generation)
        method = METHODS[self.method]
        require(
            method.critic == (self.critic is not None),
            f"critic={self.critic!r}, but {self.method} {'needs' if method.critic else 'has'} "
            f"{f'one of {CRITICS}' if method.critic else 'no critic'}.",
        )
        require(
            self.lora_r > 0 or self.quantization is None,
            f"quantization={self.quantization!r} with all weights trained (lora_r=0): 4-bit weights can't learn. Set "
            "lora_r, or leave quantization out.",
        )
        adapters = [name for name in ("critic", "reward", "reference") if getattr(self, name) == "adapter"]
        require(
            self.lora_r > 0 or not adapters,
            f"{', '.join(adapters)}: an adapter on the policy's base, all of whose weights are trained (lora_r=0). "
            "Choose 'model', or set lora_r.",
        )
        require(
            method.samples or (self.reward is None and self.vllm == "none" and self.updates_per_generation is None),
            f"{self.method} generates nothing: leave the reward, vllm and updates_per_generation out.",
        )
        require(
            self.vllm_sync == "weights" or (self.vllm == "colocate" and self.lora_r > 0),
            f"vllm_sync={self.vllm_sync!r} is for an adapter and an engine in the same processes. Set "
            "vllm='colocate' and lora_r, or leave it out.",
        )
        require(
            self.strategy != "none" or self.layout.gpus == 1,
            f"strategy='none' is one process, but {self.layout.name} has {self.layout.gpus} GPUs. Leave strategy out, "
            "or choose another.",
        )
        require(
            self.offload == "none" or self.strategy in (None, "zero2", "zero3"),
            f"offload={self.offload!r} is DeepSpeed's, but strategy={self.strategy!r}. Choose 'zero3' or 'zero2'.",
        )
        require(
            self.offload == "none" or self.optimizer == "adamw",
            f"optimizer={self.optimizer!r} with offload={self.offload!r}: in the host's memory, DeepSpeed's own AdamW "
            "takes the step. Choose optimizer='adamw'.",
        )
        require(
            0 < self.vllm_gpu_memory_utilization < 1,
            f"vllm_gpu_memory_utilization={self.vllm_gpu_memory_utilization} is a share: choose it in (0, 1).",
        )

    @property
    def samples(self) -> bool:
        return METHODS[self.method].samples

    @property
    def tokens(self) -> int:
        """Of the longest row."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.per_device_train_batch_size * METHODS[self.method].rows

    @property
    def updates(self) -> int:
        """Optimizer steps for which a GPU generates at once."""
        return self.updates_per_generation or METHODS[self.method].updates

    @property
    def micro_batches(self) -> int:
        """Of all these steps."""
        return self.gradient_accumulation_steps * self.updates

    @property
    def rollouts(self) -> int:
        """Completions that a GPU generates at once."""
        return self.per_device_train_batch_size * self.micro_batches

    @property
    def rows_of_a_prompt(self) -> int:
        """Rows of a micro-batch that have one prompt: a pair's, or a group's as far as it is in one micro-batch."""
        return min(self.rows, self.num_generations) if self.samples else METHODS[self.method].rows

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Rows and columns of what goes through the model in one pass of an update."""
        if self.share_prefixes:
            # Each branch begins with a copy of the prompt's last token
            branches = self.rows_of_a_prompt
            return -(-self.rows // branches), self.prompt_tokens + branches * (self.completion_tokens + 1)
        return self.rows, self.tokens

    @property
    def scored_columns(self) -> int:
        """Labels of each row of [`batch_shape`]."""
        if self.share_prefixes:
            return self.rows_of_a_prompt * (self.completion_tokens + 1)
        return min(self.completion_tokens + 1, self.tokens)

    @property
    def is_full(self) -> bool:
        return self.lora_r == 0

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those to be tried, the fastest first."""
        if self.strategy is not None:
            return (self.strategy,)
        if self.offload != "none":
            return ("zero2", "zero3") if self.offload == "optimizer" else ("zero3",)
        return ("none",) if self.layout.gpus == 1 else ("ddp", "zero2", "zero3")

    @property
    def shards_weights(self) -> bool:
        return self.strategy in ("zero3", "fsdp2")

    @property
    def is_deepspeed(self) -> bool:
        return self.strategy in ("zero2", "zero3")

    @property
    def base_dtype(self) -> str:
        """Of the base weights as they are held."""
        if self.is_full and self.strategy == "fsdp2":
            return "float32"  # Accelerate's, for weights that are trained
        if self.is_deepspeed:
            return "bfloat16"  # its engine's
        return self.dtype or ("float32" if self.is_full else "bfloat16")

    @property
    def trained_dtype(self) -> str:
        """Of the adapters as they are held."""
        if self.is_full:
            return self.base_dtype
        if self.is_deepspeed or self.quantization is not None:
            return "bfloat16"  # its engine's; TRL's
        return "float32"  # PEFT's default, and Accelerate's for FSDP2

    @property
    def computes_on_copies(self) -> bool:
        """Whether weights are cast where they are used, by autocast, as DeepSpeed's and FSDP2's are not."""
        held = {self.base_dtype, self.trained_dtype}
        return not self.is_deepspeed and self.strategy != "fsdp2" and held != {"bfloat16"}

    @property
    def casts_base(self) -> bool:
        """Whether the base weights are among them: they are in float32, and a pass keeps them in bfloat16, too."""
        return self.computes_on_copies and self.base_dtype == "float32"

    def but(self, **changes: Any) -> "Job":
        """This job with other settings."""
        return replace(self, **changes)

    def reduced_to(self, *names: str) -> "Job":
        """A job that is equal to others in which only these settings are the same: a key of what depends on them."""
        kept = {name: getattr(self, name) for name in {"method", "model", *names}}
        return Job(**{"layout": ANY_LAYOUT, **kept})

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        named = {name: value.name for name, value in found.items() if isinstance(value, Shape | Layout)}
        return found | named
