"""
Checkpoints of FSDP with `SHARDED_STATE_DICT`, Accelerate's default for FSDP2, in which each process writes its part of
the weights. Transformers resumes from them, but writes nothing that can be loaded without FSDP: `save_model` does
nothing at all, without a word. And beside an adapter its parts hold the trained adapter alone, not what is trained
beside it.

So here `save_model` writes whole files. A checkpoint has whole files beside its parts where the policy is an adapter.
With full weights it has the parts, so that the model isn't gathered at every checkpoint, and what
[`~trl_ext.roles.saved.consolidated_weights`] needs to make whole files of them.

These are functions of a transformers trainer.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.distributed.fsdp import StateDictType


def writes_parts(trainer: Any) -> bool:
    """Whether each process writes its part of the weights into a checkpoint."""
    if not trainer.is_fsdp_enabled:
        return False
    plugin = trainer.accelerator.state.fsdp_plugin
    return bool(plugin.state_dict_type != StateDictType.FULL_STATE_DICT)


def parts_are_all(trainer: Any) -> bool:
    """Whether what is trained is in the parts of a checkpoint, so that it needs no whole files beside them."""
    adapted = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    return not adapted and not trainer.args.save_only_model


@contextmanager
def whole_weights(trainer: Any) -> Iterator[None]:
    """Within this context, `save_model` of a trainer that writes parts gathers the weights and writes whole files."""
    plugin = trainer.accelerator.state.fsdp_plugin
    before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before


def describe_parts(trainer: Any, output_dir: str | os.PathLike[str]) -> None:
    """Write beside the parts of full weights what is needed to load them once they are put together."""
    if not trainer.args.should_save:
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.config.save_pretrained(folder)
    if policy.can_generate():
        policy.generation_config.save_pretrained(folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
