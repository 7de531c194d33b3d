"""
The files of `recipes/accelerate` and `recipes/deepspeed`, and the tables of the docs, say what the planner says. All
of them take more than a minute, and are asked for in a slow test; a quick one takes a file and a cell of the table,
others whenever a file of the planner changes.
"""

import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import trl_ext
from trl_ext.planner import layout_files, publish, tables
from trl_ext.planner.layout_files import FILES, HOW_TO_WRITE, accelerate_file, deepspeed_files
from trl_ext.planner.plan import COMFORT, make_plan
from trl_ext.run import arguments


ROOT = Path(__file__).parents[2]
ACCELERATE, DEEPSPEED = ROOT / "recipes/accelerate", ROOT / "recipes/deepspeed"
PAGE = (ROOT / publish.DOCS).read_text(encoding="utf-8")
AGAIN = f"no longer agrees with the planner. Write it again: {HOW_TO_WRITE}"
PLANNER = b"".join(file.read_bytes() for file in sorted(Path(layout_files.__file__).parent.glob("*.py")))


def sample(of: Any, count: int) -> list[Any]:
    """The same ones as long as no file of the planner changes."""
    return sorted(of, key=lambda one: hashlib.sha256(PLANNER + repr(one).encode()).digest())[:count]


def rows(name: str) -> list[list[str]]:
    """The cells of a table of the docs, without its head."""
    lines = publish.table_in(PAGE, name)[0].splitlines()[2:]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


def written_cell(cell: tuple[str, str, str]) -> str:
    method, model, layout = cell
    row = next(row for row in rows("what fits") if row[:2] == [method, model])
    return row[2 + tables.LAYOUTS.index(layout)]


@pytest.mark.parametrize("name", sample(FILES, 1))
def test_a_file_says_what_the_planner_says(name):
    assert (ACCELERATE / f"{name}.yaml").read_text() == accelerate_file(name), f"{name}.yaml {AGAIN}"


@pytest.mark.parametrize("cell", sample(tables.CELLS, 1), ids=" ".join)
def test_a_cell_of_the_docs_says_what_the_planner_says(cell):
    assert written_cell(cell) == tables.cell(*cell), f"{publish.DOCS} {AGAIN}"


@pytest.mark.slow
def test_all_that_is_published_agrees(subtests):
    for path, text in publish.texts(ROOT).items():
        with subtests.test(str(path)):
            assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path} {AGAIN}"


def test_no_file_and_no_row_is_left_over():
    assert {file.stem for file in ACCELERATE.glob("*.yaml")} == FILES.keys()
    assert {file.stem for file in DEEPSPEED.glob("*.json")} == {f.deepspeed for f in FILES.values() if f.deepspeed}
    assert [row[0] for row in rows("goals")] == [goal.words for goal in tables.GOALS]
    named = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert named == list(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_for_its_machine(name):
    """Every process has a GPU; those of a vLLM server are left to it."""
    file, config = FILES[name], yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    gpus = 1
    for factor in re.match(r"(\d+)x(?:(\d+)x)?", name).groups():
        gpus *= int(factor or 1)
    served = file.settings.get("vllm_tensor_parallel_size", 0) if file.settings.get("vllm") == "server" else 0
    assert config["num_processes"] == file.job.layout.gpus == gpus - served
    assert config["num_machines"] == file.job.layout.nodes
    if file.deepspeed:
        named = config["deepspeed_config"]["deepspeed_config_file"]
        assert named == f"recipes/deepspeed/{file.deepspeed}.json" and (ROOT / named).is_file()


def test_what_files_have_in_common_is_what_each_wants(monkeypatch):
    """A job with other buckets can't take the file of the rest."""
    changed = FILES | {"2xa100_80g": FILES["2x4xa100_80g"]}
    assert deepspeed_files().keys() == {file.deepspeed for file in FILES.values() if file.deepspeed}
    changed["4xa100_80g"] = layout_files.LayoutFile("", "dpo", "7b", "4xa100-80g", {"strategy": "zero3"}, "zero3_70b")
    monkeypatch.setattr(layout_files, "FILES", changed)
    with pytest.raises(AssertionError, match="wants another zero3_70b"):
        deepspeed_files()


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_a_comment_is_one(name, tmp_path):
    """The recipe's own parser takes it."""
    comment = [line.removeprefix("#") for line in (ACCELERATE / f"{name}.yaml").read_text().splitlines()]
    start = next(i for i, line in enumerate(comment) if "accelerate launch" in line)
    command = shlex.split(" ".join(comment[start : comment.index("", start)]).replace("\\", ""))
    command = command[command.index("accelerate") :]
    assert command[:4] == ["accelerate", "launch", "--config_file", f"recipes/accelerate/{name}.yaml"]
    job, method = FILES[name].job, FILES[name].method.upper()
    assert command[4] == f"recipes/{method.lower()}.py" and (ROOT / command[4]).is_file()
    script_class = getattr(arguments, f"{method}Arguments", arguments.PolicyArguments)
    argv = [*command[5:], "--output_dir", str(tmp_path)]
    _, args, model_args, _ = arguments.parse_arguments(script_class, getattr(trl_ext, f"{method}Config"), argv)
    assert (model_args.use_peft, model_args.load_in_4bit) == (not job.is_full, job.quantization is not None)
    if job.samples:
        assert args.per_device_train_batch_size * args.steps_per_generation == job.rollouts
        assert (args.use_vllm, args.max_completion_length) == (job.vllm != "none", job.completion_tokens)


@pytest.mark.slow
def test_the_most_completions_at_once():
    """One more leaves less than a tenth of the GPU, or doesn't fit."""
    goal = tables.GOALS[1]
    job = tables.job_by_default(goal.method, goal.model, goal.layout, **goal.settings)
    most = tables.most_at_once(job)
    free = [make_plan(job.but(gradient_accumulation_steps=count)).free for count in (most, most + 1)]
    assert free[0] >= COMFORT > free[1]
    assert f"; with {most}" in rows("goals")[1][2]
