"""
How the base of an adapter was quantized, written beside each adapter that a trainer saves: an export merges the
adapter into the weights that it was trained on.
"""

from pathlib import Path
from typing import Any

from transformers import Trainer

from ...roles.quantized import save_quantization


class SavesQuantization(Trainer):
    """A transformers trainer that says, beside what it saves, how the base of its adapter is quantized."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_quantization(self.accelerator.unwrap_model(self.model), folder)
