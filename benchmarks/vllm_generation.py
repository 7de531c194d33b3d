"""
What vLLM does for a step on a CPU: TRL's colocated engine against transformers' `generate`, by the same trainers on
the same prompts. Runs in vLLM's environment (`make setup-vllm`).

A random Qwen2 (hidden 256, 4 layers, vocabulary 2,000, float32) trains for a few steps of 16 prompts × 4 completions
of up to 64 tokens, with GRPO and with DAPO, whose refill draws new prompts for the groups without variance: half of
all. Runs with either engine take turns, in as many pairs as `--pairs` says; the first step of each is left out, in
which vLLM warms up. Reported, as medians over the pairs with their range: generated tokens a second of generation
alone, weight sync included, and seconds of a step. The engine computes with linear weights as they were loaded, and
not packed: TRL can't replace packed ones.

```shell
.venv-vllm/bin/python benchmarks/vllm_generation.py --json
```
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import trl_ext


TRAINERS = {"GRPO": trl_ext.GRPOTrainer, "DAPO": trl_ext.DAPOTrainer}
PROMPTS, GROUP, PROMPT_TOKENS = 16, 4, 32
WORDS = 2000


def save_policy(folder: Path) -> str:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *(f"w{i}" for i in range(WORDS - len(special)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def prompts() -> Dataset:
    texts = [" ".join(f"w{(i * 31 + j * 7) % 1900}" for j in range(PROMPT_TOKENS)) for i in range(512)]
    return Dataset.from_dict({"prompt": texts, "live": [i % 2 == 0 for i in range(512)]})


def reward(completion_ids: list[list[int]], live: list[bool], **columns: Any) -> list[float]:
    """Differs between the completions of every other prompt."""
    return [float(sum(ids) % 97) if alive else 0.0 for ids, alive in zip(completion_ids, live, strict=True)]


def timed(trainer_class: Any) -> Any:
    class Timed(trainer_class):
        """Notes seconds and tokens of each generation, by step."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.generations: list[tuple[int, float, int]] = []
            super().__init__(*args, **kwargs)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            found = super()._generate_single_turn(*args, **kwargs)
            tokens = sum(map(len, found[0]))
            self.generations.append((self.state.global_step, time.perf_counter() - before, tokens))
            return found

    Timed.__name__ = trainer_class.__name__
    return Timed


def run(method: str, with_vllm: bool, policy: str, arguments: Any) -> dict[str, float]:
    trainer_class = TRAINERS[method]
    config = trainer_class.config_class(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-4,
        warmup_steps=0,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=PROMPTS * GROUP // 16,
        updates_per_generation=1,
        num_generations=GROUP,
        max_completion_length=arguments.completion_tokens,
        soft_punish_cache=0,
        max_steps=arguments.steps + 1,
        seed=3,
        use_vllm=with_vllm,
        vllm_mode="colocate",
    )
    trainer = timed(trainer_class)(policy, reward, args=config, train_dataset=prompts(), processing_class=tokenizer())
    trainer.train()
    measured = [entry for entry in trainer.generations if entry[0] > 0]
    seconds, tokens = (sum(entry[i] for entry in measured) for i in (1, 2))
    steps = [log["step_time"] for log in trainer.state.log_history if "step_time" in log][1:]
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": statistics.mean(steps),
        "generation_share": seconds / sum(steps),
        "calls_per_step": len(measured) / len(steps),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median, smallest and largest of each number."""
    return {
        name: [round(f([found[name] for found in runs]), 4) for f in (statistics.median, min, max)] for name in runs[0]
    }


def compare(policy: str, arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"pairs": arguments.pairs, "steps": arguments.steps}
    for method in TRAINERS:
        runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for pair in range(arguments.pairs):
            for with_vllm in (True, False) if pair % 2 == 0 else (False, True):
                runs[with_vllm].append(run(method, with_vllm, policy, arguments))
        ratios = [
            vllm["tokens_per_second"] / plain["tokens_per_second"]
            for vllm, plain in zip(runs[True], runs[False], strict=True)
        ]
        steps = [
            vllm["step_seconds"] / plain["step_seconds"] for vllm, plain in zip(runs[True], runs[False], strict=True)
        ]
        found[method] = {
            "vllm": summary(runs[True]),
            "transformers": summary(runs[False]),
            "tokens_per_second_ratio": [round(f(ratios), 3) for f in (statistics.median, min, max)],
            "step_ratio": [round(f(steps), 3) for f in (statistics.median, min, max)],
        }
    return found


def rows(found: dict[str, Any]) -> list[str]:
    """The table of `RESULTS.md`."""

    def shown(numbers: list[float], digits: int) -> str:
        middle, low, high = (f"{number:,.{digits}f}" for number in numbers)
        return f"{middle} ({low} to {high})"

    lines = [
        "| method | engine | tokens a second | seconds of a step | share of generation |",
        "|---|---|---|---|---|",
    ]
    for method in TRAINERS:
        for engine in ("transformers", "vllm"):
            of = found[method][engine]
            lines.append(
                f"| {method} | {engine} | {shown(of['tokens_per_second'], 0)} | {shown(of['step_seconds'], 2)} | "
                f"{of['generation_share'][0]:.0%} |"
            )
        both = found[method]
        lines.append(f"| | ratio | {shown(both['tokens_per_second_ratio'], 2)} | {shown(both['step_ratio'], 2)} | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--completion_tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from vllm_engine.cpu_engine import cpu_engines

    with tempfile.TemporaryDirectory() as folder, cpu_engines(max_num_seqs=PROMPTS * GROUP):
        found = compare(save_policy(Path(folder) / "policy"), arguments)
    print("\n".join(rows(found)))
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
