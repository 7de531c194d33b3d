"""`recipes/ppo.py` on CPUs with FSDP2: `fsdp_recipe.py [arguments of the recipe]`, for `test_written_plans.py`."""

import gc
import runpy
import sys
from pathlib import Path

from torch.distributed.fsdp import FSDPModule


sys.path.insert(0, str(Path(__file__).parents[1]))

from distributed.fsdp_worker import force_fsdp


if __name__ == "__main__":
    force_fsdp()
    left = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "ppo.py"), run_name="__main__")
    assert any(isinstance(found, FSDPModule) for found in gc.get_objects())
