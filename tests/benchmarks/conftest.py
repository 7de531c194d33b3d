"""Modules that benchmarks share are imported as the scripts import them."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
