"""
The planner against reality: what it says that trainers hold and take, and what they hold and take on a CPU.

`states`: real runs of two processes under ZeRO-2, ZeRO-3, FSDP2 and DDP. Every storage is counted once, by role, when
gradients and the optimizer's states are there. `steps`: real steps of one process. The most that is alive at once in
generation, in passes without gradients and in an update, with shared prompts and without.

Numbers are in bfloat16 as on a GPU, and so are the types of weights. What is not as on a GPU: TRL's head folds tiles
of logits with Triton there, and is replaced here by what takes as much memory and computes nothing; attention is that
of torch for CPUs; and nothing is known of CUDA, NCCL, and what the allocator keeps.

```shell
python benchmarks/planner_accuracy.py --size tiny
python benchmarks/planner_accuracy.py --size 100m --report  # writes the table into docs/planner.md
```
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from planner_runs import SIZES, Found, allow_fsdp_on_cpus, leave, quiet, run, shape, write_models

from trl_ext.planner.job import Job
from trl_ext.planner.launch_files import accelerate_config, deepspeed_config
from trl_ext.planner.layouts import Layout
from trl_ext.planner.phases import phases_of
from trl_ext.planner.states import held_states


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "planner.md"
STRATEGIES = ("zero2", "zero3", "fsdp2", "ddp")
ROLES = [("ppo", "head"), ("ppo", "adapter"), ("ppo", "model"), ("dpo", None), ("dapo", None)]
# Prompt and completion in tokens; what persists doesn't depend on them
LENGTHS = {"states": {"tiny": (24, 8), "100m": (8, 4)}, "steps": {"tiny": (96, 32), "100m": (24, 8)}}
PARTS = ("base weights", "adapter", "critic", "reward", "reference", "gradients", "optimizer")
# The whole of what is held, and of what a phase takes; all else is a part
TOTALS = ("together", "generate", "old and reference passes", "update")
OF_TOTAL, OF_PART, SMALL = 0.05, 0.10, 0.01


def jobs(kind: str, size: str, strategy: str) -> dict[str, Job]:
    """All cases, by name."""
    prompt, completion = LENGTHS[kind][size]
    found = {}
    for method, critic in ROLES:
        for full in (False, True) if critic != "adapter" else (False,):
            own = "model" if full else "adapter"
            for share in (False, True) if kind == "steps" else (False,):
                words = [method, critic, "full" if full else "LoRA", "shared" if share else None]
                found[" ".join(word for word in words if word)] = Job(
                    method,
                    shape(size),
                    Layout("CPU", 1 if strategy == "none" else 2),
                    strategy=strategy,
                    lora_r=0 if full else 8,
                    critic=critic,
                    reward=own if method == "ppo" else None,
                    reference=None if method == "dapo" else own,
                    prompt_tokens=prompt,
                    completion_tokens=completion,
                    per_device_train_batch_size=2 if method == "dpo" else 4,
                    gradient_accumulation_steps=2,
                    updates_per_generation=None if method == "dpo" else 1,
                    # Groups that fill a micro-batch, or differ in it
                    num_generations=4 if share else 2,
                    share_prefixes=share,
                    ds3_gather_for_generation=True if strategy == "zero3" else None,
                )
    if kind == "states":
        found["dapo LoRA in 4 bits"] = found["dapo LoRA"].but(quantization="4bit")
    return found


# Real runs, in processes of their own


def work(kind: str, size: str, strategy: str, names: list[str], folder: Path) -> None:
    """Runs cases in this process, one of several perhaps, and writes what they held and took."""
    quiet()
    if strategy == "fsdp2":
        allow_fsdp_on_cpus()
    found = {}
    for name, job in jobs(kind, size, strategy).items():
        if name in names:
            print(name, flush=True)
            found[name] = asdict(run(job, folder, folder / "out", passes=kind == "steps"))
            if int(os.environ.get("RANK", 0)) == 0:
                (folder / f"{kind}_{strategy}.json").write_text(json.dumps(found))
    leave()


def launch(
    kind: str, size: str, strategy: str, names: list[str], folder: Path, keep: Path | None = None
) -> dict[str, Found]:
    """Runs cases in new processes: one for `none`, two otherwise. What `keep` has is taken from there."""
    kept = None if keep is None else keep / f"{size}_{kind}_{strategy}.json"
    if kept is not None and kept.is_file():
        before = json.loads(kept.read_text())
        if before.keys() >= set(names):
            return {name: Found(**before[name]) for name in names}
    script = [str(Path(__file__).resolve()), "--worker", strategy, "--kind", kind, "--size", size]
    script += ["--folder", str(folder), "--cases", *names]
    python = [sys.executable]
    if strategy in ("zero2", "zero3"):
        job = next(iter(jobs(kind, size, strategy).values()))
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed_config(job)))
        config = accelerate_config(job, str(folder / "deepspeed.json")) | {"use_cpu": True}
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
        python += ["-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    elif strategy != "none":
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([*python, *script], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{strategy} ended with status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-20000:]}")
    found = json.loads((folder / f"{kind}_{strategy}.json").read_text())
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return {name: Found(**of_case) for name, of_case in found.items()}


# Comparisons


def planned_states(job: Job) -> dict[str, float]:
    from trl_ext.planner.models import count_numbers

    states = held_states(job, count_numbers(job)).gpu
    return {part: states.get(part, 0.0) for part in PARTS if states.get(part)}


def planned_steps(job: Job) -> dict[str, float]:
    """Each phase's own moment: what persists is compared with states."""
    held = held_parts(job)
    found = {}
    for phase in phases_of(job):
        own = {part: size for part, size in phase.parts.items() if part not in held}
        found[phase.name] = sum(own.values())
        if phase.name == "update":
            kept = ("activations kept", "gradients kept beside")
            found["kept for the backward pass"] = sum(own.get(part, 0.0) for part in kept)
    return {name: size for name, size in found.items() if name not in ("load", "save")}


def held_parts(job: Job) -> set[str]:
    from trl_ext.planner.phases import SPARE

    return {*PARTS, "gradient buckets", *SPARE}


def measured_steps(job: Job, found: Found) -> dict[str, float]:
    passes = found.passes
    names = {"generate": "generate", "passes": "old and reference passes"}
    if not job.share_prefixes:  # what scoring shares isn't planned
        names["score"] = "score"
    of_phases = {name: float(passes[key]) for key, name in names.items() if key in passes}
    return of_phases | {
        "update": float(max(passes["update, forward"], passes["update, backward"])),
        "kept for the backward pass": float(passes["update, kept"]),
    }


def compared(kind: str, job: Job, found: Found) -> dict[str, dict[str, float]]:
    """Bytes by part, planned and measured."""
    if kind == "states":
        planned = planned_states(job)
        measured = {part: float(found.held.get(part, 0.0)) for part in PARTS}
        planned |= {"together": sum(planned.values())}
        measured |= {"together": sum(measured.values())}
    else:
        planned, measured = planned_steps(job), measured_steps(job, found)
    parts = [part for part in measured if measured[part] or planned.get(part)]
    return {part: {"planned": planned.get(part, 0.0), "measured": measured[part]} for part in parts}


def error(row: dict[str, float]) -> float:
    return row["planned"] / row["measured"] - 1.0 if row["measured"] else float("inf")


def mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"


def percent(row: dict[str, float]) -> str:
    return f"{100 * error(row):+.1f} %"


def lines(table: dict[str, Any]) -> Iterator[str]:
    for how, cases in table.items():
        for name, rows in cases.items():
            cells = [
                f"{part} {row['measured'] / 2**20:.2f} MiB {100 * error(row):+.1f} %" for part, row in rows.items()
            ]
            yield f"{how:>6} {name}: {'; '.join(cells)}"


def cell(rows: dict[str, dict[str, float]], part: str) -> str:
    return f"{mib(rows[part]['measured'])}, {percent(rows[part])}" if part in judged(rows) else "–"


def worst_part(rows: dict[str, dict[str, float]]) -> str:
    found = {part: size for part, size in judged(rows).items() if part not in TOTALS}
    part = max(found, key=lambda name: abs(found[name]))
    return f"{part} {percent(rows[part])}"


def as_markdown(table: dict[str, Any]) -> str:
    """What is held by case and strategy, and what phases take by case."""
    found = []
    held = {how: cases for how, cases in table.items() if how != "steps"}
    if held:
        found += ["| held by a process | " + " | ".join(held) + " |", "|---" * (len(held) + 1) + "|"]
        for name in next(iter(held.values())):
            of_case = [f"{cell(cases[name], 'together')} ({worst_part(cases[name])})" for cases in held.values()]
            found.append(f"| {name} | {' | '.join(of_case)} |")
        found.append("")
    if "steps" in table:
        columns = (*TOTALS[1:], "score", "kept for the backward pass")
        found += ["| a step | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        found += [
            f"| {name} | {' | '.join(cell(rows, part) for part in columns)} |" for name, rows in table["steps"].items()
        ]
    return "\n".join(found)


def write_report(table: dict[str, Any], size: str) -> None:
    """Puts the tables between the markers of their size."""
    start, stop = (f"<!-- {word} {size} -->" for word in ("begin", "end"))
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    after = rest.split(stop)[1]
    PAGE.write_text(f"{before}{start}\n{as_markdown(table)}\n{stop}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model (default: tiny)")
    parser.add_argument("--kind", choices=LENGTHS, help="states or steps (default: both)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES, help="of states")
    parser.add_argument("--cases", nargs="+", help="names of cases that count, or their beginning (default: all)")
    parser.add_argument("--keep", type=Path, help="folder for what runs found: what is there isn't run again")
    parser.add_argument("--report", action="store_true", help="write the table into docs/planner.md")
    parser.add_argument("--worker", help="run in this process, one of those of this strategy")
    parser.add_argument("--folder", type=Path, help="with --worker: folder of the models")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    if args.worker:
        work(args.kind, args.size, args.worker, args.cases, args.folder)
        return
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = args.folder or Path(directory)
        write_models(folder, shape(args.size), jobs("states", args.size, "ddp")["dapo LoRA"])
        for kind in [args.kind] if args.kind else list(LENGTHS):
            for strategy in args.strategies if kind == "states" else ["none"]:
                wanted = {
                    name: job
                    for name, job in jobs(kind, args.size, strategy).items()
                    if args.cases is None or name.startswith(tuple(args.cases))
                }
                found = launch(kind, args.size, strategy, list(wanted), folder, args.keep)
                table[kind if kind == "steps" else strategy] = {
                    name: compared(kind, job, found[name]) for name, job in wanted.items()
                }
                print(*lines({strategy: table[kind if kind == "steps" else strategy]}), sep="\n", flush=True)
    if args.report:
        write_report(table, args.size)
    print(json.dumps(summary(table)))


def judged(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Errors by part, without parts that are less than a hundredth of the largest: a head, a text's rewards."""
    largest = max(row["measured"] for row in rows.values())
    return {part: error(row) for part, row in rows.items() if max(row.values()) >= SMALL * largest}


def summary(table: dict[str, Any]) -> dict[str, Any]:
    """The worst errors, of totals and of parts."""
    totals: dict[str, float] = {}
    parts: dict[str, float] = {}
    for how, cases in table.items():
        for name, rows in cases.items():
            for part, found in judged(rows).items():
                (totals if part in TOTALS else parts)[f"{how} {name}: {part}"] = round(found, 4)
    return {
        kind: dict(sorted(found.items(), key=lambda item: -abs(item[1]))[:3])
        for kind, found in (("totals", totals), ("parts", parts))
    }


if __name__ == "__main__":
    main()
