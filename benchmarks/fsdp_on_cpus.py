"""FSDP on a machine without a GPU. The tests take it from here, too."""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def force_fsdp() -> None:
    """Accelerate ignores its FSDP plugin where there is no GPU, which torch doesn't need."""
    init = AcceleratorState.__init__

    def forced(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = forced
