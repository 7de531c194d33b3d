"""
Messages of other packages that a run from the command line leaves out, by name: nobody who trains can act on them.
The library leaves out none.
"""

import logging
import os
import re
import warnings
from typing import NamedTuple


class Message(NamedTuple):
    """
    A message that is left out.

    Args:
        logger (`str`):
            The logger that has it, or `""` for a Python warning.
        begins (`str`):
            How it begins: a regular expression.
        why (`str`):
            Why there is nothing to do.
    """

    logger: str
    begins: str
    why: str


LEFT_OUT = (
    Message("", r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", "TRL's own use of transformers' old name"),
    Message("", r"`torch\.jit\.script", "torch's own use of what it has deprecated"),
    Message(
        "bitsandbytes.backends.cpu.ops",
        r"Failed to load CPU gemm_4bit",
        "a faster kernel for 4-bit weights on a CPU; the usual one is taken",
    ),
    Message(
        "DeepSpeed",
        r"Setting accelerator to CPU",
        "looked for where DeepSpeed is installed, whether it is used or not",
    ),
    Message(
        "transformers.integrations.integration_utils",
        r'Trainer is attempting to log a value of "None"',
        "a quantity that no completion of a log has, such as the length of those that ended; TRL logs it as `None`",
    ),
    Message(
        "datasets.packaged_modules.json.json", r"Failed to load JSON", "said again by the error that names the file"
    ),
    Message(
        "datasets.packaged_modules.parquet.parquet", r"Failed to read schema", "said again by the error that follows"
    ),
)
# Seconds for which a bar has to last to be shown, and between two states of it
BARS = {"TQDM_DELAY": "10", "TQDM_MININTERVAL": "10"}


def be_quiet() -> None:
    """Leaves the messages out from now on, in this process; before the packages are imported that have them."""
    for message in LEFT_OUT:
        if message.logger:
            logging.getLogger(message.logger).addFilter(_Without(message.begins))
        else:
            warnings.filterwarnings("ignore", message.begins)
    for name, value in BARS.items():  # which tqdm reads when it is imported
        os.environ.setdefault(name, value)


class _Without(logging.Filter):
    def __init__(self, begins: str) -> None:
        super().__init__()
        self.pattern = re.compile(begins)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None
