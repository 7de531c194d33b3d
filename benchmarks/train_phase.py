"""
What does a training step cost without generation: TRL's `GRPOTrainer` against `trl_ext.GRPOTrainer`?

Both train a random model on the same synthetic rollouts, handed over by a `rollout_func`, in turn (A B, then B A).
Time is that of `train()` between its begin and its end; the gradient of every step is compared in runs of their own,
which are not timed, as is memory: the tensors that autograd keeps for the backward pass of a micro-batch (on a GPU,
what CUDA allocated at its peak).

Workloads, by completion length: `uniform` (all the longest), `lognormal` (mu 4.2, sigma 0.8, cut to 8–512),
`bimodal` (one group in four long, the others short), in groups of 4 rows; every row has a prompt of 16 tokens of its
own. In `prefix` and `prefix_short`, 16 rows share a prompt of 512 or 32 tokens (± 20 %), and completions are lognormal
with median 40, cut at 128. `--dead` is the share of groups whose rewards are all equal. `--against unshared` compares
with our own trainer that shares no prompts.

```shell
python benchmarks/train_phase.py --workload lognormal --dead 0.3 --json
python benchmarks/train_phase.py --device cuda --json   # a 0.5B-shaped model, completions up to 4,096 tokens
```
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trl
from datasets import Dataset
from overhead import interval
from task import build_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

import trl_ext


# Model shape, longest completion and vocabulary; Qwen2.5-0.5B's on a GPU
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "longest": 512,
        "config": {
            "vocab_size": 2000,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    },
    "cuda": {
        "longest": 4096,
        "config": {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    },
}
ROWS, MICRO_BATCH, ACCUMULATION = 64, 4, 16


@dataclass(frozen=True)
class Workload:
    """Rows of a group, tokens of a prompt, and whether the rows of a group have the same one."""

    group: int = 4
    prompt: int = 16
    shared: bool = False


WORKLOADS = {
    "uniform": Workload(),
    "lognormal": Workload(),
    "bimodal": Workload(),
    "prefix": Workload(16, 512, shared=True),
    "prefix_short": Workload(16, 32, shared=True),
}


def lengths(workload: str, longest: int, generator: torch.Generator) -> list[int]:
    """Completion lengths of one generation batch."""
    group = WORKLOADS[workload].group
    if WORKLOADS[workload].shared:
        # Median 40 and longest 128 where the longest of other workloads is 512
        drawn = (torch.randn(ROWS, generator=generator) * 0.6).exp() * 40 * longest / 512
        return drawn.clamp(1, longest // 4).int().tolist()
    if workload == "uniform":
        return [longest] * ROWS
    if workload == "lognormal":
        # mu 4.2 at a longest of 512; the same shape where completions are longer
        drawn = (torch.randn(ROWS, generator=generator) * 0.8 + 4.2).exp() * longest / 512
        return drawn.clamp(max(1, longest // 64), longest).int().tolist()
    groups = torch.rand(ROWS // group, generator=generator) < 0.25
    spread = torch.rand(ROWS, generator=generator) * 0.2 + 0.8
    return [max(1, int(s * longest / (1 if groups[i // group] else 16))) for i, s in enumerate(spread.tolist())]


class Rollouts:
    """A `rollout_func`: the same completions and rewards, batch after batch, for whoever asks."""

    def __init__(self, workload: str, dead: float, longest: int, vocabulary: int, prompt: int | None) -> None:
        self.prompt = prompt
        self.workload, self.dead, self.longest, self.vocabulary = workload, dead, longest, vocabulary
        self.batch = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.batch)
        kind = WORKLOADS[self.workload]
        groups = ROWS // kind.group
        # Whole groups, with the right share over several batches
        dead = int((self.batch + 1) * self.dead * groups + 0.5) - int(self.batch * self.dead * groups + 0.5)
        self.batch += 1

        def ids(length: int) -> list[int]:
            return torch.randint(4, self.vocabulary, (length,), generator=generator).tolist()

        if kind.shared:
            spread = torch.rand(groups, generator=generator) * 0.4 + 0.8
            of_groups = [ids(int((self.prompt or kind.prompt) * s)) for s in spread.tolist()]
            prompt_ids = [of_groups[i // kind.group] for i in range(len(prompts))]
        else:
            prompt_ids = [ids(kind.prompt) for _ in prompts]
        completions = [ids(length) for length in lengths(self.workload, self.longest, generator)]
        is_dead = torch.randperm(groups, generator=generator) < dead
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": None,
            "score": [0.0 if is_dead[i // kind.group] else float(i % 2) for i in range(len(prompts))],
        }


def score(completion_ids: list[list[int]], score: list[float], **kwargs: Any) -> list[float]:
    return score


class Watch(TrainerCallback):
    """Time of training, and where asked for, gradients."""

    def __init__(self, device: str, gradients: bool) -> None:
        self.device, self.keep = device, gradients
        self.gradients: list[torch.Tensor] = []
        self.seconds = 0.0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = self.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = self.now() - self.started

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.keep:
            self.gradients.append(torch.cat([p.grad.float().flatten().cpu() for p in model.parameters()]))


def measured(trainer_class: Any) -> Any:
    """`trainer_class` that counts tokens and memory of every micro-batch."""

    class Measured(trainer_class):
        slots = tokens = peak_memory = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            on_gpu = self.accelerator.device.type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
            kept: dict[int, int] = {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = super().training_step(*args, **kwargs)
            peak = torch.cuda.max_memory_allocated() if on_gpu else sum(kept.values())
            self.peak_memory = max(self.peak_memory, peak)
            return result

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs["attention_mask"] if "attention_mask" in kwargs else args[2]
            sharing = getattr(self, "sharing", None)
            before = sharing.token_slots if sharing else 0
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self.slots += sharing.token_slots - before if sharing else mask.numel()
            self.tokens += int(mask.sum())
            return result

    Measured.__name__ = trainer_class.__name__
    return Measured


def train(side: str, args: argparse.Namespace, detailed: bool) -> dict[str, Any]:
    trainer_class, config_class = {
        "trl": (trl.GRPOTrainer, trl.GRPOConfig),
        "unshared": (trl_ext.GRPOTrainer, partial(trl_ext.GRPOConfig, share_prefixes=False)),
        "trl_ext": (trl_ext.GRPOTrainer, trl_ext.GRPOConfig),
    }[side]
    size, tokenizer = SIZES[args.device] | {"longest": args.longest}, build_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **size["config"],
            max_position_embeddings=2 * size["longest"] + 2 * (args.prompt or 0),
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    watch = Watch(args.device, gradients=detailed)
    cpu = args.device == "cpu"
    with tempfile.TemporaryDirectory() as directory:
        config = config_class(
            output_dir=directory,
            use_cpu=cpu,
            bf16=not (cpu or detailed),  # gradients are compared in float32
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            optim="sgd",
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            loss_type=args.loss_type,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            num_generations=WORKLOADS[args.workload].group,
            max_completion_length=size["longest"],
            max_steps=args.steps,
        )
        trainer = (measured(trainer_class) if detailed else trainer_class)(
            model=model,
            reward_funcs=score,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [f"s{i}=" for i in range(256)]}),
            processing_class=tokenizer,
            rollout_func=Rollouts(
                args.workload, args.dead, size["longest"], size["config"]["vocab_size"], args.prompt
            ),
            callbacks=[watch],
        )
        trainer.train()
    found = {"seconds": watch.seconds, "gradients": watch.gradients}
    if detailed:
        found |= {"slots": trainer.slots, "tokens": trainer.tokens, "memory": trainer.peak_memory}
    return found


def seconds_in_turn(sides: Sequence[str], rounds: int, run: Callable[[str], dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each side's runs. Sides take turns, and each is first as often as the others."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(rounds):
        for side in sides if i % 2 == 0 else reversed(sides):
            seconds[side].append(run(side)["seconds"])
    return seconds


def compared(theirs: str, detail: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Our time over the other side's, pair by pair, and the error of our gradients."""
    ratios = [mine / other for mine, other in zip(seconds["trl_ext"], seconds[theirs], strict=True)]
    errors = [
        ((mine - other).norm() / other.norm()).item()
        for mine, other in zip(detail["trl_ext"]["gradients"], detail[theirs]["gradients"], strict=True)
    ]
    low, high = interval(ratios)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "pairs": len(ratios),
        f"seconds_{theirs}": statistics.median(seconds[theirs]),
        "seconds": statistics.median(seconds["trl_ext"]),
        "grad_relative_error": max(errors),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result line by line, and if wanted once more as JSON."""
    for key, value in result.items():
        print(f"{key:>20}: {value:.4g}" if isinstance(value, float) else f"{key:>20}: {value}")
    if as_json:
        print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="lognormal")
    parser.add_argument("--dead", type=float, default=0.3, help="share of groups without variance (default: 0.3)")
    parser.add_argument("--prompt", type=int, help="tokens of a shared prompt (default: the workload's)")
    parser.add_argument("--against", choices=("trl", "unshared"), default="trl", help="what is compared with")
    parser.add_argument("--loss_type", default="dapo")
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--longest", type=int, help="tokens of the longest completion (default: 512; on a GPU 4096)")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of runs (default: 5)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a run (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    args.longest = args.longest or SIZES[args.device]["longest"]
    torch.set_num_threads(1)

    # Not timed, and a warm-up for what is
    detail = {side: train(side, args, detailed=True) for side in (args.against, "trl_ext")}
    seconds = seconds_in_turn(list(detail), args.pairs, lambda side: train(side, args, detailed=False))
    ours, theirs = detail["trl_ext"], detail[args.against]
    result = {
        "workload": args.workload,
        "dead": args.dead,
        "loss_type": args.loss_type,
        "device": device_name(args.device),
        "against": args.against,
        **compared(args.against, detail, seconds),
        "real_tokens": theirs["tokens"],
        f"padded_tokens_{args.against}": theirs["slots"],
        "padded_tokens": ours["slots"],
        "computed_tokens": ours["tokens"],
        "memory_ratio": ours["memory"] / theirs["memory"],
    }
    show(result, args.json)


if __name__ == "__main__":
    main()
