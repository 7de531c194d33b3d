"""
How much longer does a multiplication take in attention than in a linear layer?

The cost rule of shared prompts (`trl_ext/rollouts/prefix_exactness.py`) needs this number. Forward and backward passes
over the same number of tokens are timed in rows of different lengths, once with a mask of padding and once with a mask
of places; a straight line through them gives the cost of a pair of places, in the cost of a token.

```shell
python benchmarks/prefix_cost.py
python benchmarks/prefix_cost.py --device cuda
```
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_ext.rollouts import prefix_exactness


# Hidden size, layers, heads, and the size of the MLP
SHAPES = {"cpu": [(64, 2, 4, 192), (256, 4, 4, 768), (576, 4, 9, 1536)], "cuda": [(896, 24, 14, 4864)]}
COLUMNS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (512, 1024, 2048, 4096)}
TOKENS = {"cpu": 2048, "cuda": 16384}


def seconds(model: Any, rows: int, columns: int, of_places: bool, device: str) -> float:
    """Of one forward and backward pass over random tokens, without the head."""
    ids = torch.randint(4, 2000, (rows, columns), device=device)
    mask = torch.ones(rows, columns, dtype=torch.long, device=device)
    mask[0, 0] = 0  # without any padding, attention needs no mask
    if of_places:
        mask = torch.ones(columns, columns, dtype=torch.bool, device=device).tril().expand(rows, 1, -1, -1)

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.mean().backward()
    return now() - started


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line `seconds = base · (1 + slope · columns)` through pairs of columns and seconds, by least squares."""
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return rise / (mean_y - rise * mean_x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tokens", type=int, help="of a pass (default: 2048; on a GPU 16384)")
    parser.add_argument(
        "--columns", type=int, nargs="+", help="lengths of rows (default: 64 to 1024; on a GPU to 4096)"
    )
    args = parser.parse_args()
    args.tokens, args.columns = args.tokens or TOKENS[args.device], args.columns or COLUMNS[args.device]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for hidden, layers, heads, mlp in SHAPES[args.device]:
        config = Qwen2Config(
            vocab_size=2000,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=mlp,
            max_position_embeddings=8192,
        )
        whole = Qwen2ForCausalLM(config).to(args.device).train()
        if args.device == "cuda":
            whole = whole.bfloat16()
        in_theory = prefix_exactness.pass_cost(whole, args.device).pair
        in_theory /= prefix_exactness.SLOWER_IN_ATTENTION[args.device]
        for of_places in (False, True):
            points = []
            for columns in args.columns:
                rows = args.tokens // columns
                taken = [seconds(whole.model, rows, columns, of_places, args.device) for _ in range(args.repetitions)]
                points.append((float(columns), statistics.median(taken)))
            print(
                f"hidden {hidden}, {layers} layers, mask of {'places' if of_places else 'padding'}: "
                f"{slope(points) / in_theory:.2f} times a linear layer's multiplication "
                f"({', '.join(f'{x:.0f}: {y:.3f} s' for x, y in points)})"
            )


if __name__ == "__main__":
    main()
