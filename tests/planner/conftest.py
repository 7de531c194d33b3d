"""Real runs are those of a benchmark, imported as its script imports them."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
