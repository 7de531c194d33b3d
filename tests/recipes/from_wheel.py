"""
What a user of the wheel does (`make test-recipes`): build it, install it into a clean environment, and run the smoke
configuration of every recipe through `accelerate launch`, in a folder that has nothing else.

The environment is `build/from_wheel/.venv`, with the versions of `requirements.lock`. It is kept, and made anew when
that file changes; the wheel is built and installed each time.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from smoke import FIRST, LAUNCHER, TASK


ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "from_wheel"
BIN = BUILD / ".venv" / "bin"
LOCK = ROOT / "requirements.lock"
LIMIT = 900.0  # seconds for a recipe, on a machine that may be busy
# Neither the clone nor a user's own settings may be found
HIDDEN = ("PYTHONPATH", "VIRTUAL_ENV", "ACCELERATE_CONFIG_FILE", "MPLBACKEND")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in HIDDEN}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Printed by the installed package: where recipes are, and what each is run with
CATALOGUE = """
from trl_ext.run.catalogue import list_recipes
for recipe in list_recipes():
    for config in recipe.configs:
        if config.startswith("smoke_"):
            print(recipe.file.parent, recipe.name, config)
"""


def run(*command: str | Path, cwd: Path = ROOT, timeout: float | None = None) -> str:
    """What a command prints; if it fails, this program ends with that."""
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, timeout=timeout, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def install() -> None:
    """Builds the wheel, and installs it into the environment, which is made where it isn't there."""
    made = BUILD / "made"
    if not made.is_file() or made.read_text() != LOCK.read_text():
        run(sys.executable, "-m", "venv", "--clear", BUILD / ".venv")
        torch = next(line for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
        run(BIN / "pip", "install", "--quiet", torch)  # first, as in `make setup`
    for old in BUILD.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", BUILD, ROOT)
    (wheel,) = BUILD.glob("*.whl")
    run(BIN / "pip", "install", "--quiet", "-c", LOCK, wheel)
    run(BIN / "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    made.write_text(LOCK.read_text())


def main(chosen: Sequence[str]) -> None:
    began = time.monotonic()
    install()
    print(f"Installed in {time.monotonic() - began:.0f} s: {run(BIN / 'trl-ext', '--version', cwd=BUILD).strip()}")
    folder = BUILD / f"run_{time.strftime('%Y%m%d_%H%M%S')}"
    folder.mkdir()
    run(BIN / "trl-ext", "run", "sort_digits", *TASK, cwd=folder)
    lines = [line.rsplit(" ", 2) for line in run(BIN / "python", "-c", CATALOGUE, cwd=folder).splitlines()]
    assert lines and all(BUILD in Path(recipes).parents for recipes, _, _ in lines), "not those of the wheel"
    lines.sort(key=lambda line: (line[1] not in FIRST, line[1] != "sft", line[1]))
    for recipes, name, config in lines:
        if chosen and name not in (*FIRST, *chosen):
            continue
        started = time.monotonic()
        script = Path(recipes) / f"{name}.py"
        run(BIN / "accelerate", "launch", *LAUNCHER, script, "--config", config, cwd=folder, timeout=LIMIT)
        print(f"{name:<16}{time.monotonic() - started:6.1f} s", flush=True)
    print(f"Every recipe ran, in {time.monotonic() - began:.0f} s, from the wheel. What they left is in {folder}.")


if __name__ == "__main__":
    main(sys.argv[1:])
