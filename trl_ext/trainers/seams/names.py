"""The names under which TRL knows a trainer."""

from typing import Any


def method_name(trainer: Any) -> str:
    """
    The name of a trainer's method as TRL writes it into model cards and default folders, for example `"DPO"`.

    Args:
        trainer (trainer of TRL or of `trl_ext`, or its class):
            What to name.
    """
    return str(trainer._name)
