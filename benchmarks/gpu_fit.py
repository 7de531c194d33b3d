"""
Does a run take the memory and the time on a GPU that the planner says? PPO on a 32B-shaped model, in bfloat16 and in 4
bits, and DPO, DAPO, GRPO and PPO on a 7B-shaped one, against `trl_ext.planner`.

Models have random weights, which are made on the GPU: nothing is downloaded or written. A process may have 80 GB of a
GPU, or `--gib`. Each part is a process of its own that trains three steps, of which the first is a warm-up for time:
LoRA of rank 16 on all linear layers, gradient checkpointing, the reference by adapter switch, a linear head as critic,
completions of full length. The two parts of GRPO differ in whether the eight completions of a prompt compute it once
(with FlexAttention); PPO on 7B has the same rows as GRPO without sharing.

Memory is the peak of what PyTorch's allocator gave out and of what it reserved, from one border of phases to the next:
generation begins and ends, rewards are computed, the batch is ready (log-probabilities of old policy and reference and
values are there), the step ends. The plan beside it is without its allowances for CUDA and fragmentation. Time is a
step's, waiting for the GPU at each border; the planner's is a roofline for an A100, and of no other GPU.

What no longer fits into `--minutes` is skipped, a part that fails prints its error, and the rest goes on.

```shell
python benchmarks/gpu_fit.py --report    # on a CUDA machine: at most 10 minutes, then the table in RESULTS.md
python benchmarks/gpu_fit.py --tiny      # the same code on a CPU, with tiny models: no memory is measured
```
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turns import quiet_environment


# Torch is imported where a part runs: the main process only starts them and writes down what they say.

RESULTS = Path(__file__).with_name("RESULTS.md")
MARKERS = ("<!-- gpu_fit -->", "<!-- /gpu_fit -->")
STEPS = 3
TIMED = STEPS - 1  # all but the first
TINY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        method (`str`):
            One of the planner's.
        shape (`str`):
            One of the planner's, or `tiny`.
        seconds (`float`):
            A guess of what the part takes on an H100. With less time left, it isn't begun.
        prompt, completion (`int`):
            Tokens.
        rows, micro_batches (`int`):
            Rows (DPO: pairs) of a micro-batch, and micro-batches of a step.
        four_bit (`bool`):
            Whether the base is in 4 bits.
        shares (`bool`):
            Whether completions of a prompt compute it once.
    """

    method: str
    shape: str
    seconds: float
    prompt: int = 512
    completion: int = 256
    rows: int = 1
    micro_batches: int = 8
    four_bit: bool = False
    shares: bool = False


GROUPS = {"prompt": 1024, "completion": 128, "rows": 8, "micro_batches": 2}
PARTS: dict[str, Part] = {
    # The order in which they are run: what matters most comes first
    "PPO 32B": Part("ppo", "32b", 150),
    "DPO 7B": Part("dpo", "7b", 45, rows=2, micro_batches=4),
    "DAPO 7B": Part("dapo", "7b", 60, rows=8, micro_batches=2),
    "GRPO 7B, prompts shared": Part("grpo", "7b", 60, shares=True, **GROUPS),
    "GRPO 7B, not shared": Part("grpo", "7b", 60, **GROUPS),
    "PPO 7B": Part("ppo", "7b", 60, **GROUPS),
    "PPO 32B, 4 bits": Part("ppo", "32b", 150, four_bit=True),
}


def tiny(part: Part) -> Part:
    """The same part on a model that a CPU trains in a second."""
    return Part(part.method, "tiny", 5, 16, 8, part.rows, part.micro_batches, part.four_bit, part.shares)


# What happens in the process of a part


class Phases:
    """
    Seconds and peaks of memory by phase, from what a trainer of `trl_ext` does.

    Args:
        on_gpu (`bool`):
            Whether there is memory to measure.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.steps: list[dict[str, float]] = [{}]
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.name: str | None = None
        self.began = 0.0

    def begin(self, name: str | None) -> None:
        """Ends the phase that was, and begins another; `None`: none."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.name is not None:
            step = self.steps[-1]
            step[self.name] = step.get(self.name, 0.0) + now - self.began
            if self.on_gpu:
                for peaks, found in (
                    (self.allocated, torch.cuda.max_memory_allocated()),
                    (self.reserved, torch.cuda.max_memory_reserved()),
                ):
                    peaks[self.name] = max(peaks.get(self.name, 0), found)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.name, self.began = name, time.perf_counter()

    def _around(self, call: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.begin(before)
            result = call(*args, **kwargs)
            self.begin(after)
            return result

        return measured

    def follow(self, trainer: Any) -> None:
        """From now on, the phases of a trainer. The names are the planner's."""
        from transformers import TrainerCallback

        phases, passes = self, "old and reference passes"

        class Steps(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                phases.begin("update")

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                phases.begin("update")
                phases.steps.append({})

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                phases.begin(None)

        trainer.add_callback(Steps())
        if hasattr(trainer, "_generate_single_turn"):
            trainer._generate_single_turn = self._around(trainer._generate_single_turn, "generate", passes)
            trainer._calculate_rewards = self._around(trainer._calculate_rewards, passes, passes)
            scored = trainer._generate_and_score_completions
            trainer._generate_and_score_completions = self._around(scored, passes, "update")

    def seconds(self) -> dict[str, float]:
        """Means of the steps after the first, by phase."""
        steps = [step for step in self.steps[1 : 1 + TIMED] if step]
        names = dict.fromkeys(name for step in steps for name in step)
        return {name: sum(step.get(name, 0.0) for step in steps) / len(steps) for name in names}


def shape_of(part: Part) -> Any:
    from transformers import Qwen2Config

    from trl_ext.planner.shapes import Shape, find_shape

    if part.shape != "tiny":
        return find_shape(part.shape)
    return Shape("tiny", Qwen2Config(**TINY, max_position_embeddings=128), "a tiny model")


@contextmanager
def made_on(device: str) -> Iterator[None]:
    """Weights that are made in this context are in bfloat16, on that device."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def build_model(part: Part, shape: Any, device: str) -> Any:
    """A model with random weights on the device; of one in 4 bits, a layer at a time is in bfloat16."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with made_on(device):
        if not part.four_bit:
            return AutoModelForCausalLM.from_config(shape.config)
        model = AutoModelForCausalLM.from_config(shape.with_layers(1))
        kind, config = type(model.model.layers[0]), model.config
        config.num_hidden_layers, config.layer_types = shape.layers, config.layer_types[:1] * shape.layers
        layers = nn.ModuleList()
        for number in range(shape.layers):
            layer = kind(config, number)
            for parent in layer.modules():
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(parent, name, in_4_bits(linear, device))
            layers.append(layer)
            if device == "cuda":
                torch.cuda.empty_cache()
        model.model.layers = layers
    model.is_loaded_in_4bit = True  # which PEFT and TRL ask for
    return model


def in_4_bits(linear: Any, device: str) -> Any:
    """A linear layer with the same weights as bitsandbytes' nf4."""
    import bitsandbytes as bnb
    import torch

    found = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    weight = linear.weight.data.to("cpu" if device == "cpu" else device)
    found.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=found).to(device)
    if linear.bias is not None:
        found.bias = linear.bias
    return found


def build_tokenizer(vocabulary: int) -> Any:
    """A token for each word that a model knows. The one that ends a completion is rare: all have their full length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocabulary - 2)} | {"<pad>": vocabulary - 2}
    backend = Tokenizer(models.WordLevel(words | {"<eos>": vocabulary - 1}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def text_of(tokens: int, generator: Any) -> str:
    return " ".join(f"w{number}" for number in generator.choices(range(100), k=tokens))


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Different ones within every group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def build_trainer(part: Part, model: Any, folder: str, on_gpu: bool) -> Any:
    """The method's trainer, as a recipe would make it."""
    import random

    from datasets import Dataset
    from peft import LoraConfig

    import trl_ext

    draw = random.Random(0)
    rows: list[dict[str, str]] = []
    for _ in range(256):
        row = {"prompt": text_of(part.prompt, draw)}
        if part.method == "dpo":
            row |= {side: f" {text_of(part.completion, draw)}" for side in ("chosen", "rejected")}
        rows.append(row)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": part.rows,
        "gradient_accumulation_steps": part.micro_batches,
        "use_cpu": not on_gpu,
        "bf16": True,
        "gradient_checkpointing": True,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    given: dict[str, Any] = {}
    if part.method == "dpo":
        settings["max_length"] = part.prompt + part.completion + 1
    else:
        given["reward_funcs"] = [rewards]
        settings |= {"max_completion_length": part.completion, "share_prefixes": part.shares}
        settings["num_generations"] = 8 if part.rows * part.micro_batches > 8 or part.method != "ppo" else 1
        settings |= {"steps_per_generation": part.micro_batches, "num_iterations": 1}  # an update a generation
    name = part.method.upper()
    return getattr(trl_ext, f"{name}Trainer")(
        model=model,
        args=getattr(trl_ext, f"{name}Config")(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(model.config.vocab_size),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", lora_dropout=0.0),
        **given,
    )


def planned(part: Part, shape: Any, layout: Any) -> dict[str, Any]:
    """The planner's phases, in bytes without its allowances and in seconds on an A100."""
    from trl_ext.planner.job import METHODS, Job
    from trl_ext.planner.phases import SPARE
    from trl_ext.planner.plan import plan_one
    from trl_ext.planner.speed import forecast

    job = Job(
        part.method,
        shape,
        layout,
        strategy="none",
        quantization="4bit" if part.four_bit else None,
        critic="head" if METHODS[part.method].critic else None,
        reference="adapter" if METHODS[part.method].reference else None,
        prompt_tokens=part.prompt,
        completion_tokens=part.completion,
        per_device_train_batch_size=part.rows,
        gradient_accumulation_steps=part.micro_batches,
        updates_per_generation=1 if METHODS[part.method].samples else None,
        share_prefixes=part.shares,
        dtype="bfloat16",
    )
    plan, times = plan_one(job), forecast(job)
    sizes = {phase.name: sum(size for name, size in phase.parts.items() if name not in SPARE) for phase in plan.phases}
    return {
        "bytes": sizes,
        "seconds": {phase["name"]: phase["seconds"] for phase in times["phases"]},
        "fits": plan.fits,
        "tokens": job.rollouts * METHODS[part.method].rows * job.tokens,
    }


def run_part(part: Part, gib: float) -> dict[str, Any]:
    """Trains a part in this process."""
    import torch

    from trl_ext.planner.layouts import GIB
    from trl_ext.run.machine import host_bytes, layout_of, own_gpu

    found = None if part.shape == "tiny" else own_gpu()
    on_gpu, device = found is not None, "cuda" if found is not None else "cpu"
    name, size = found or ("no GPU", 0)
    if on_gpu:
        whole = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole))
        size = min(size, int(gib * GIB))
    torch.manual_seed(0)
    shape, phases = shape_of(part), Phases(on_gpu)
    phases.begin("load")
    model = build_model(part, shape, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(part, model, folder, on_gpu)
        phases.begin(None)
        phases.follow(trainer)
        trainer.train()
        log = next(row for row in reversed(trainer.state.log_history) if "loss" in row)
    layout = layout_of(name, size or int(gib * GIB), 1, 1, host_bytes())
    return {
        "machine": name,
        "torch": torch.__version__,
        "seconds": phases.seconds(),
        "allocated": phases.allocated,
        "reserved": phases.reserved,
        "loss": log["loss"],
        "planned": planned(part, shape, layout),
    }


# What happens in the main process


def start_part(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A part in a process of its own: what it found, or why there is nothing."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--gib", str(args.gib)]
    if args.tiny:
        command.append("--tiny")
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, env=quiet_environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no end after {seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"failed": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"took": time.monotonic() - began}


def run_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every part for which there is time."""
    end = time.monotonic() + 60 * args.minutes
    results: dict[str, dict[str, Any]] = {}
    for name in args.parts or PARTS:
        left, part = end - time.monotonic(), tiny(PARTS[name]) if args.tiny else PARTS[name]
        if left < part.seconds:
            results[name] = {"failed": f"skipped: {left:.0f} s left of {args.minutes:g} minutes"}
        else:
            results[name] = start_part(name, args, left)
        found = results[name]
        print(f"{name}: {found.get('failed') or '{:.0f} s'.format(found['took'])}", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Phases of every part, measured and planned."""
    gib = 2**30
    lines = [
        "| part | phase | allocated, GiB | reserved | planned | seconds a step | planned for an A100 |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, found in results.items():
        if "failed" in found:
            lines.append(f"| {part} | {found['failed'].replace('|', '/')} | | | | | |")
            continue
        plan, memory = found["planned"], found["allocated"]
        names = dict.fromkeys([*memory, *found["seconds"], *plan["seconds"]])
        for name in names:
            sizes = [memory.get(name), found["reserved"].get(name), plan["bytes"].get(name)]
            seconds = [found["seconds"].get(name), plan["seconds"].get(name)]
            cells = ["" if size is None else f"{size / gib:.2f}" for size in sizes]
            cells += ["" if second is None else f"{second:.3g}" for second in seconds]
            lines.append(f"| {part} | {name} | {' | '.join(cells)} |")
        step = sum(found["seconds"].values())
        rate = f"{plan['tokens'] / step:,.0f} tokens/s"
        expected = f"{plan['tokens'] / sum(plan['seconds'].values()):,.0f} tokens/s"
        lines.append(f"| {part} | step | | | | {step:.3g}, {rate} | {expected} |")
    return lines


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Times of a phase or a step, over that of another part."""
    pairs = {
        "update, prompts shared over not shared": ("GRPO 7B, prompts shared", "GRPO 7B, not shared", "update"),
        "step, PPO over GRPO": ("PPO 7B", "GRPO 7B, not shared", None),
    }

    def seconds(name: str, phase: str | None) -> float:
        found = results[name]["seconds"]
        return float(sum(found.values()) if phase is None else found[phase])

    return {
        told: seconds(one, phase) / seconds(other, phase)
        for told, (one, other, phase) in pairs.items()
        if all("seconds" in results.get(name, {}) for name in (one, other))
    }


def report(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """What was measured, and where."""
    done = next((found for found in results.values() if "machine" in found), None)
    where = "No part ran to its end." if done is None else f"{done['machine']}, torch {done['torch']}"
    cap = f"{args.gib:g} GiB of a GPU at most. " if done and done["allocated"] else "No memory was measured. "
    told = [f"{name}: {value:.3f}." for name, value in ratios(results).items()]
    about = f"{where}; {cap}Seconds are means of {TIMED} steps."
    return "\n".join([about, "", *table(results), *(["", *told] if told else [])])


def write(text: str, file: Path) -> None:
    """Puts a text between the markers of a file, which get a section of their own at first."""
    begin, end = MARKERS
    old = file.read_text(encoding="utf-8") if file.is_file() else ""
    if begin not in old:
        title = "## Does the planner say what a GPU says? (`python benchmarks/gpu_fit.py --report`)"
        old = f"{old.rstrip()}\n\n{title}\n\n{begin}\n{end}\n".lstrip()
    before, rest = old.split(begin, 1)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together (default: 10)")
    parser.add_argument("--gib", type=float, default=74.5, help="memory that a part may have (default: 74.5, 80 GB)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU")
    parser.add_argument(
        "--report", type=Path, nargs="?", const=RESULTS, metavar="FILE", help="write the table into RESULTS.md or FILE"
    )
    parser.add_argument("--part", choices=PARTS, help="run this part in this process")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    if args.part is not None:
        with redirect_stdout(sys.stderr):  # what trainers print
            found = run_part(tiny(PARTS[args.part]) if args.tiny else PARTS[args.part], args.gib)
        print(json.dumps(found))
        return
    if args.tiny and args.report == RESULTS:
        parser.error("--report with --tiny: what tiny models take is no result. Name a FILE.")
    results = run_all(args)
    text = report(results, args)
    print(text)
    if args.report is not None:
        write(text, args.report)
    if args.json:
        parts = {name: asdict(tiny(PARTS[name]) if args.tiny else PARTS[name]) for name in results}
        print(json.dumps({"parts": parts, "results": results, "ratios": ratios(results)}))


if __name__ == "__main__":
    main()
