"""
The one policy of a run of several trainers, and how it is handed from one trainer to the next.
"""

import gc
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ..roles.trunk import gathered, load_adapter, save_adapter, sharing_weights
from ..trainers.seams.checkpoints import random_states, set_random_states
from ..trainers.seams.processes import forget_accelerator


class SharedPolicy:
    """
    A model with one adapter that is in memory once, however many trainers train it one after the other. Each trainer
    gets modules of its own around the same weights, so that the wrappers, hooks and adapters that a trainer adds
    disappear with that trainer.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Loaded, and given its adapter, when the policy is first needed.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration of the adapter, for a model without one.
        model_init_kwargs (`Mapping[str, Any]`):
            Arguments of `from_pretrained` for a model that is given by name. Weights are loaded in float32 unless
            these say otherwise.
        seed (`int`):
            Seed of a new adapter.
        start (`Path`):
            Folder in which the adapter is saved before any training.
        latest_adapter (`Callable[[], Path]`):
            Returns the folder with the adapter that the last finished stage left.
    """

    def __init__(
        self,
        model: Any,
        peft_config: Any,
        model_init_kwargs: Mapping[str, Any],
        seed: int,
        start: Path,
        latest_adapter: Callable[[], Path],
    ) -> None:
        self._given, self._peft_config, self._init_kwargs = model, peft_config, dict(model_init_kwargs)
        self._seed, self._start, self._latest_adapter = seed, start, latest_adapter
        self._model: PeftModel | None = None
        self._trainable: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    @property
    def model(self) -> PeftModel:
        """The model with its adapter, as the last finished stage left it. Loaded at the first access."""
        if self._model is None:
            self._model = self._load()
            self._trainable = {name for name, weight in self._model.named_parameters() if weight.requires_grad}
            self._dtypes = {name: weight.dtype for name, weight in self._model.named_parameters()}
        return self._model

    def _load(self) -> PeftModel:
        model = self._given
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **self._init_kwargs})
        if not isinstance(model, PeftModel):
            set_seed(self._seed)
            model = get_peft_model(model, self._peft_config)
        state = PartialState()
        if (self._start / "adapter_config.json").is_file():
            load_adapter(model, self._latest_adapter())
        elif state.is_main_process:
            partial = self._start.with_name(f"{self._start.name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            save_adapter(model, partial)
            partial.rename(self._start)
        state.wait_for_everyone()
        return model

    def shared(self) -> PeftModel:
        """Modules of their own around the policy's weights."""
        shared: PeftModel = sharing_weights(self.model)
        return shared

    def trainer(self, build: Callable[[PeftModel], Any], seed: int, beside: bool = False) -> Any:
        """
        A trainer of the policy that doesn't depend on what ran before it in this process.

        Args:
            build (`Callable[[PeftModel], trainer]`):
                Constructs it around the modules that it is given.
            seed (`int`):
                Seed of everything that is drawn during construction.
            beside (`bool`, *optional*, defaults to `False`):
                Whether another trainer of the policy is at work, which is not to notice.
        """
        if beside:
            states = random_states()
            set_seed(seed)
            trainer = build(self.shared())
            trainer.model.to(trainer.accelerator.device)
            set_random_states(states)
            return trainer
        self._restore_weights()
        forget_accelerator()  # each stage has a DeepSpeed configuration of its own
        set_seed(seed)
        with gathered(self.model):  # TRL may copy the adapter
            trainer = build(self.shared())
        if not any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            trainer.model.to(trainer.accelerator.device)  # DeepSpeed places the model itself when training begins
        return trainer

    def _restore_weights(self) -> None:
        """Gives weights the type and the trainability that they had before generation, or an engine, changed them."""
        changed = False
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trainable)
            if parameter.dtype != self._dtypes[name] and not hasattr(parameter, "ds_id"):
                parameter.data, changed = parameter.data.to(self._dtypes[name]), True
        if changed:
            load_adapter(self.model, self._latest_adapter())


def release(trainer: Any) -> None:
    """Frees a trainer, and everything that it has put around the weights of the policy."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = None
    trainer.callback_handler.callbacks.clear()
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
