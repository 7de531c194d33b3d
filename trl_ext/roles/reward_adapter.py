"""
A reward model that is an adapter, as TRL's `RewardTrainer` saves one with PEFT: LoRA weights and a score head, learned
on some base model. Its weights go into a policy on the same base, as one more adapter that nothing trains. The head
stays outside of the policy, in float32, and so outside of the policy's checkpoints.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig

from ..errors import require
from .adapters import check_base_is_frozen
from .saved import ADAPTER_CONFIG


REWARD_ADAPTER = "reward"
# What sequence classifiers of causal models call their head
HEADS = ("score", "classifier")
BEFORE_NAMES = "base_model.model."  # PEFT's, in files
# Starts of LoRA that leave the base model as it is. The others change it, so that the file belongs to a changed base.
STARTS_ON_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# The attribute of a policy that has the folder of each of its reward adapters, by name
REWARD_ADAPTERS = "trl_ext_reward_adapters"
ON_ITS_OWN = (
    "load it as a model of its own (its folder as text in reward_funcs; on the command line --share_reward_base false)"
)


def is_adapter(name: Any) -> bool:
    """Whether a name is that of a folder in which PEFT saved an adapter."""
    return isinstance(name, str | Path) and (Path(name) / ADAPTER_CONFIG).is_file()


def without_head(folder: str, base: str | None) -> str:
    """The error message for an adapter that is no reward model."""
    return (
        f"The adapter in {folder}, on the base {base!r}, has no score head: it is no reward model. Train one with "
        "recipes/reward.py --use_peft true (TRL's RewardTrainer with task_type='SEQ_CLS' in the peft_config, or "
        "modules_to_save=['score'])."
    )


def check_has_head(folder: str) -> None:
    """
    Raises `ValueError` for the folder of a LoRA without a head, which TRL would load as a reward model whose head is
    random.
    """
    config: Any = PeftConfig.from_pretrained(folder)
    only_lora = all("lora_" in name for name in load_peft_weights(folder, device="cpu"))
    require(not only_lora, without_head(folder, config.base_model_name_or_path))


class RewardAdapter:
    """
    The files of a reward model that is an adapter.

    Args:
        folder (`str` or `Path`):
            Folder in which PEFT saved it, or its id on the Hub.

    Attributes:
        config ([`~peft.LoraConfig`]):
            Its configuration, as it was saved.
        head (`torch.nn.Linear`):
            Its score head, in float32.

    Raises:
        ValueError: if there is no adapter, it is no LoRA, it has no head or one with more than one output, or it holds
            weights that are neither LoRA's nor the head's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        require(
            is_adapter(self.folder) or not Path(self.folder).exists(),
            f"There is no adapter in {self.folder}: adapter_config.json is missing. Pass a folder that "
            "recipes/reward.py wrote with --use_peft true.",
        )
        try:
            config = PeftConfig.from_pretrained(self.folder)
        except ValueError as error:
            message = f"There is no adapter in {self.folder}: {error}. Pass the folder of one, or its id on the Hub."
            raise ValueError(message) from error
        self.config = config
        self._check_kind(config)
        self.head = self._read_head()

    @property
    def named(self) -> str:
        """How an error message begins that is about this adapter."""
        return f"The reward adapter in {self.folder}, on the base {self.base!r},"

    @property
    def base(self) -> str | None:
        """Name of the base model that it was trained on."""
        name: str | None = self.config.base_model_name_or_path
        return name

    def _check_kind(self, config: Any) -> None:
        kind = getattr(config.peft_type, "value", config.peft_type)
        require(
            isinstance(config, LoraConfig) and kind == "LORA",
            f"{self.named} is of the type {kind}, and only LoRA can share the policy's base. Train a LoRA, or "
            f"{ON_ITS_OWN}.",
        )
        start = config.init_lora_weights
        require(
            start in STARTS_ON_THE_BASE,
            f"{self.named} was started with init_lora_weights={start!r}, which changes the base, and the policy's is "
            "as it was. Save it as a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or "
            f"{ON_ITS_OWN}.",
        )
        others = {name for name in (config.modules_to_save or ()) if name not in HEADS}
        require(
            not others and config.bias == "none" and not config.trainable_token_indices,
            f"{self.named} has more than its LoRA and its head (modules_to_save={sorted(others)}, "
            f"bias={config.bias!r}, trainable_token_indices={config.trainable_token_indices}), which a policy can't "
            f"share. Train it without, or {ON_ITS_OWN}.",
        )

    def _read_head(self) -> nn.Linear:
        weights = load_peft_weights(self.folder, device="cpu")
        own = {name: weight for name, weight in weights.items() if self._is_of_head(name)}
        unknown = [name for name in weights if name not in own and "lora_" not in name]
        require(
            not unknown,
            f"{self.named} has {len(unknown)} weights that are neither LoRA's nor the head's, such as "
            f"{(unknown or [''])[0]!r}. Train it without them, or {ON_ITS_OWN}.",
        )
        found = {name.rpartition(".")[2]: weight for name, weight in own.items()}
        require(bool(own), without_head(self.folder, self.base))
        require(
            len(own) == len(found) and found.keys() <= {"weight", "bias"} and found["weight"].dim() == 2,
            f"{self.named} has a head of several layers, {sorted(own)}. Train it on a causal model, or {ON_ITS_OWN}.",
        )
        outputs, size = found["weight"].shape
        require(
            outputs == 1,
            f"{self.named} has a head with {outputs} outputs, and a reward is one number. Train it with num_labels=1, "
            "or write a reward function that makes one number of its outputs.",
        )
        head = nn.Linear(size, 1, bias="bias" in found)
        head.load_state_dict({name: weight.float() for name, weight in found.items()})
        return head.requires_grad_(False)

    @staticmethod
    def _is_of_head(name: str) -> bool:
        return any(name.startswith(f"{BEFORE_NAMES}{head}.") for head in HEADS) and "lora_" not in name

    def check_base(self, config: Any, name: str | None, check_name: bool = True) -> None:
        """
        Whether a policy has the base that this adapter was trained on.

        Args:
            config ([`~transformers.PretrainedConfig`]):
                The policy's.
            name (`str`, *optional*):
                The policy's id or folder.
            check_name (`bool`, *optional*, defaults to `True`):
                Whether the base must also have the policy's name. Weights of another model of the same shape would
                give rewards that nobody trained, without an error.

        Raises:
            ValueError: naming adapter, base and remedy.
        """
        text = config.get_text_config()
        named = f"{name!r}" if name else "in memory"
        remedy = (
            f"Train the reward adapter on the policy's base (recipes/reward.py --use_peft true --model_name_or_path "
            f"{name or 'BASE'}), or {ON_ITS_OWN}."
        )
        require(
            text.hidden_size == self.head.in_features,
            f"{self.named} reads hidden states of size {self.head.in_features}, and those of the policy's base "
            f"{named} have {text.hidden_size}. {remedy}",
        )
        own = self._config_of_base(bool(getattr(config, "auto_map", None)))
        for attribute, meaning in (("vocab_size", "tokens in its vocabulary"), ("num_hidden_layers", "layers")):
            mine, other = getattr(own, attribute, None), getattr(text, attribute, None)
            require(
                None in (mine, other) or mine == other,
                f"{self.named} learned with {mine} {meaning}, and the policy's base {named} has {other}. {remedy}",
            )
        require(
            not check_name or not name or not self.base or _is_same(name, self.base),
            f"{self.named} was trained on another base than the policy's, {named}. {remedy} If "
            f"both names mean the same weights, write {name!r} as base_model_name_or_path into its "
            "adapter_config.json, or pass AdapterReward(..., check_base_name=False).",
        )

    def _config_of_base(self, trust_remote_code: bool) -> Any:
        """The text configuration of the base by its own name; `None` if it isn't there any more."""
        if not self.base:
            return None
        try:
            config: Any = AutoConfig.from_pretrained(self.base, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            return None
        return config.get_text_config()

    def add_to(self, policy: Any, adapter: str = REWARD_ADAPTER) -> None:
        """
        Load the LoRA weights into a policy, as one more adapter. Nothing trains it, and the policy computes what it
        computed before.

        Args:
            policy ([`~peft.PeftModel`]):
                A policy on the base of this adapter, not wrapped for several processes.
            adapter (`str`, *optional*, defaults to `"reward"`):
                Its name in the policy.

        Raises:
            ValueError: if the policy has another adapter of that name, trains weights that the adapter relies on, or
                is no place for its weights.
        """
        check_base_is_frozen(policy, self.named, ON_ITS_OWN)
        there: dict[str, str] = getattr(policy, REWARD_ADAPTERS, {})
        if there.get(adapter) == self.folder:  # of an earlier trainer of the same model
            return
        require(
            adapter not in policy.peft_config,
            f"{self.named} would be {adapter!r} in the policy, which has an adapter of that name already. Pass "
            f"AdapterReward(..., adapter='another name'), or remove it with model.delete_adapter({adapter!r}).",
        )
        config = copy.deepcopy(self.config)
        config.inference_mode, config.modules_to_save, config.init_lora_weights = True, None, True
        config.lora_dropout = 0.0  # it isn't trained, and dropout anywhere would keep passes from sharing prompts
        config.task_type = policy.peft_config[policy.active_adapters[0]].task_type
        weights = {n: w for n, w in load_peft_weights(self.folder, device="cpu").items() if not self._is_of_head(n)}
        remedy = f"Train it on the policy's base, or {ON_ITS_OWN}."
        try:
            policy.add_adapter(adapter, config)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.named} can't be loaded beside the policy's adapter: {error} {remedy}") from error
        try:
            result: Any = set_peft_model_state_dict(policy, weights, adapter_name=adapter)
            problem = [n for n in result.missing_keys if adapter in n.split(".")] + list(result.unexpected_keys)
            require(not problem, f"{len(problem)} weights are missing or unknown, such as {(problem or [''])[0]!r}.")
        except (RuntimeError, ValueError) as error:
            policy.delete_adapter(adapter)
            raise ValueError(f"{self.named} is not of the policy's shape: {error} {remedy}") from error
        for name, weight in policy.named_parameters():
            if adapter in name.split("."):
                weight.requires_grad_(False)
        setattr(policy, REWARD_ADAPTERS, {**there, adapter: self.folder})


def _is_same(name: str, other: str) -> bool:
    """Whether two names mean one model: equal ones, or paths to the same folder."""
    return name == other or (Path(name).exists() and Path(name).resolve() == Path(other).resolve())


@contextmanager
def without_reward_adapters(policy: nn.Module) -> Iterator[None]:
    """Within this context, a policy is saved without its reward adapters. They have files of their own."""
    names: dict[str, str] = getattr(policy, REWARD_ADAPTERS, {})
    if not names or not isinstance(policy, PeftModel):
        yield
        return
    own = [name for name in policy.peft_config if name not in names]
    policy.save_pretrained = partial(policy.save_pretrained, selected_adapters=own)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del policy.save_pretrained
