"""`python -m trl_ext.planner`: the same as `trl-ext plan`. A program, which no room imports."""

import sys

from ..cli import main


if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
