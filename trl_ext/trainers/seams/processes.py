"""
The state that Accelerate keeps for a process, as far as several trainers in one process need to change it.
"""

from accelerate.state import AcceleratorState


def forget_accelerator() -> None:
    """
    Lets the next trainer of this process configure Accelerate anew. `AcceleratorState` is shared by all `Accelerator`s
    of a process and takes one DeepSpeed configuration only, while each trainer brings its own. What is common to them,
    such as the process group and the device, stays.
    """
    AcceleratorState._reset_state()
