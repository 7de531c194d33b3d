"""
Do several value heads on one trunk disagree enough to say something? AsyPPO (https://huggingface.co/papers/2510.01656)
trains each of several critics on its own share of the prompts, and reads their disagreement: where they agree, an
advantage is taken for noise. There they are small models of their own; here they are heads of one trunk.

PPO of the study `outcome` (`ppo_learning.py`, all weights) is trained with such heads: a state's value is their mean,
and each head learns on its own prompts only. With each generation batch the heads' standard deviation is compared with
what it should foretell: how far their mean is from the return that follows.

```shell
python benchmarks/critic_heads.py --heads 2 4 --seeds 2
```
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning_runs import TokenCounter
from ppo_learning import ALL_WEIGHTS, CRITIC, shape_of_runs, start_of_outcome
from scipy.stats import spearmanr
from task import ROOT, TrainingTask
from torch import nn
from transformers import PrinterCallback

import trl_ext
from trl_ext.roles.critic import CRITICS, Critic, ValueHead


# Settings of `head`, which this critic doesn't take
NOT_OURS = {"critic_head": None, "critic_trunk_grad": None}


class HeadsCritic(Critic):
    """
    Several heads on the actor's last hidden state. In a pass with gradient, a row's value is that of the head to which
    its prompt belongs; in a pass without, the mean over heads.

    Attributes:
        spreads (`list[torch.Tensor]`):
            For each row of the passes without gradient since the last look, the heads' standard deviation after each
            token.
    """

    kind = "heads"
    learning_rate_factor = 100.0
    reads_token_ids = True  # to tell prompts apart
    heads_wanted = 2
    equals_token = 0

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ValueHead(hidden_size, "mlp") for _ in range(heads))
        self.spreads: list[torch.Tensor] = []

    @classmethod
    def for_policy(cls, policy: Any, config: Any, value_model: Any = None, reward_model: Any = None) -> Any:
        return cls(policy.config.hidden_size, cls.heads_wanted)

    @classmethod
    def from_description(cls, description: dict[str, Any], actor: Any) -> Any:
        raise NotImplementedError("It is measured, and not saved.")

    def values(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        each = torch.stack([head(hidden) for head in self.heads])  # (K, B, S)
        if not torch.is_grad_enabled():
            self.spreads += each.std(dim=0).unbind()
            return each.mean(dim=0)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        in_prompt = ((ids == self.equals_token).cumsum(dim=1) == 0) & mask.bool()
        places = torch.arange(1, ids.size(1) + 1, device=ids.device)
        start = mask.argmax(dim=1, keepdim=True)
        owner = (ids * in_prompt * (places - start) ** 2).sum(dim=1) % len(self.heads)
        return each[owner, torch.arange(len(ids), device=ids.device)]


class WatchedPPO(trl_ext.PPOTrainer):
    """
    Compares the heads' spread with what they get wrong.

    Attributes:
        found (`list[dict]`):
            For each generation batch: `spread`, the mean standard deviation over heads, in standard deviations of the
            returns; `of_spread` and `of_value`, Spearman's correlation of |return − V| with that spread and with what
            V itself foretells, V (1 − V): an outcome is most open where V is ½.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: list[dict[str, float]] = []

    def _estimate(self, output: dict[str, Any], state_values: torch.Tensor, training: bool) -> torch.Tensor:
        means = super()._estimate(output, state_values, training)
        mask = output["completion_mask"].bool()
        rows, columns = mask.shape
        critic: Any = self.critic
        # One value for each state in which a token was written
        spread = torch.stack([row[-columns - 1 : -1] for row in critic.spreads[-rows:]])[mask].numpy()
        critic.spreads = []
        value, returns = output["old_values"][mask].numpy(), output["returns"][mask].numpy()
        if np.ptp(spread) > 0 and np.ptp(returns) > 0:
            error = np.abs(returns - value)
            self.found.append(
                {
                    "spread": float(spread.mean() / returns.std()),
                    "of_spread": float(spearmanr(spread, error).statistic),
                    "of_value": float(spearmanr(value * (1 - value), error).statistic),
                }
            )
        return means


def train(start: Path, seed: int, heads: int, generations: int) -> dict[str, Any]:
    """Means over the second half of a run, in which the critic knows something."""
    HeadsCritic.heads_wanted = heads
    counter = TokenCounter()
    task = TrainingTask(seed=seed, model_path=str(start), reward_func=counter, train_size=8192)
    HeadsCritic.equals_token = task.tokenizer.convert_tokens_to_ids("=")
    with tempfile.TemporaryDirectory() as directory:
        settings = task.settings(
            directory,
            **shape_of_runs(generations),
            fit_micro_batches=False,  # rows stay in their order
            **{**ALL_WEIGHTS, **CRITIC, "critic_lam": 1.0, "critic": "heads", **NOT_OURS},
        )
        trainer = WatchedPPO(args=trl_ext.PPOConfig(**settings), **task.arguments())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    half = trainer.found[len(trainer.found) // 2 :]
    return {name: float(np.mean([batch[name] for batch in half])) for name in ("spread", "of_spread", "of_value")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--model", type=Path, help="folder of the start; default: made by the recipes, one per seed")
    parser.add_argument("--generations", type=int, default=60, help="generation batches of a run (default: 60)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "benchmarks" / "ppo_learning")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    CRITICS[HeadsCritic.kind] = HeadsCritic
    results = []
    print("| heads | seed | spread over heads / sd of returns | correlation with the error: spread | V (1 − V) |")
    print("|---|---|---|---|---|")
    for heads in args.heads:
        for seed in range(args.seeds):
            found = train(args.model or start_of_outcome(args.output_dir, seed), seed, heads, args.generations)
            results.append({"heads": heads, "seed": seed, **found})
            numbers = " | ".join(f"{found[name]:.2f}" for name in ("spread", "of_spread", "of_value"))
            print(f"| {heads} | {seed} | {numbers} |", flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
