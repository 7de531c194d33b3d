"""
PPO's gradient, against a twin that is written differently: one row after the other, without padding, hooks or micro-
batches, in lists where the trainer has tensors.

Every case trains by SGD on two generation batches, two optimizer steps each. The twin starts each step from the
weights that the trainer had, and says what the gradient must be.
"""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import Qwen2ForSequenceClassification, TrainerCallback

from trl_ext import PPOTrainer


pytestmark = pytest.mark.train


TOLERANCE = 1e-5
EOS = 2


# Rewards: functions of one completion, so that the twin can ask them, too


def outcome(ids: list[int]) -> float:
    return 3.0 * (sum(token * 7**i for i, token in enumerate(ids)) % 101 / 101) - 1.0


def parity(ids: list[int]) -> list[float]:
    return [float(token % 2) - 0.25 for token in ids]


def milestones(ids: list[int]) -> list[tuple[int, float]]:
    """Steps at some tokens, the first of them twice; at none of some completions."""
    return [(i, 0.5 + i) for i, token in enumerate(ids) if token % 3 == 0] + [(0, 0.5)] * (ids[0] % 3 == 0)


def sometimes(ids: list[int]) -> float | None:
    return None if ids[0] % 2 else outcome(ids[::-1])


def sometimes_by_step(ids: list[int]) -> list[float] | None:
    return None if ids[-1] % 2 else parity(ids)


def as_reward(func: Callable[[list[int]], Any]) -> Any:
    def reward(completion_ids: list[list[int]], **columns: Any) -> list[Any]:
        return [func(ids) for ids in completion_ids]

    reward.__name__ = func.__name__
    return reward


# The twin


@dataclass
class Row:
    """A completion, which of its tokens the policy wrote, and what is to be learned from it."""

    prompt: list[int]
    ids: list[int]
    wrote: list[bool]
    rewards: list[float] = field(default_factory=list)
    scored: bool = True
    right: bool = False
    old_logps: list[float] = field(default_factory=list)
    old_values: list[float] = field(default_factory=list)
    ref_logps: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.prompt), tuple(self.ids)

    @property
    def steps(self) -> list[int]:
        return [t for t, own in enumerate(self.wrote) if own]


def rows_of(batch: dict[str, Any]) -> list[Row]:
    rows = []
    for i in range(len(batch["completion_ids"])):
        shown, written = batch["prompt_mask"][i].bool(), batch["completion_mask"][i].bool()
        tools = batch["tool_mask"][i][written] if "tool_mask" in batch else written[written]
        rows.append(
            Row(
                batch["prompt_ids"][i][shown].tolist(),
                batch["completion_ids"][i][written].tolist(),
                tools.bool().tolist(),
            )
        )
    return [row for row in rows if row.ids]


class Models:
    """The policy, its critic and the reference, without anything of ours around them."""

    def __init__(self, trainer: Any) -> None:
        self.args = trainer.args
        self.policy, self.reference = tiny.stopping(), tiny.stopping()
        self.backbone = copy.deepcopy(trainer.critic.backbone) if trainer.args.critic == "model" else None
        self.head = {name: value.detach().clone() for name, value in trainer.critic.named_parameters()}
        self.head = {name: value for name, value in self.head.items() if not name.startswith("backbone.")}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        own = {name: value for name, value in weights.items() if not name.startswith("critic.")}
        self.policy.load_state_dict(own)
        of_critic = {name.removeprefix("critic."): value for name, value in weights.items() if name not in own}
        self.head = {name: of_critic[name].clone().requires_grad_() for name in self.head}
        if self.backbone is not None:
            prefix = "backbone."
            self.backbone.load_state_dict(
                {name.removeprefix(prefix): v for name, v in of_critic.items() if name.startswith(prefix)}
            )

    def parameters(self) -> dict[str, torch.Tensor]:
        named = dict(self.policy.named_parameters()) | {f"critic.{name}": v for name, v in self.head.items()}
        if self.backbone is not None:
            named |= {f"critic.backbone.{name}": v for name, v in self.backbone.named_parameters()}
        return named

    def values(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self.backbone is not None:
            return (self.backbone(ids).last_hidden_state @ self.head["score.weight"].T).squeeze(-1)[0]
        share = self.args.critic_trunk_grad or 0.0
        hidden = hidden.detach() + share * (hidden - hidden.detach())
        if self.args.critic_head == "mlp":
            hidden = functional.gelu(hidden @ self.head["head.dense.weight"].T + self.head["head.dense.bias"])
        return (hidden @ self.head["head.out.weight"].T + self.head["head.out.bias"]).squeeze(-1)[0]

    def read(self, row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities (T), values before each token and after the last (T + 1), entropies (T)."""
        ids, start = torch.tensor([row.prompt + row.ids]), len(row.prompt) - 1
        hidden = self.policy.model(ids).last_hidden_state
        logits = self.policy.lm_head(hidden)[0, start:-1] / self.args.temperature
        distribution = torch.distributions.Categorical(logits=logits)
        return distribution.log_prob(torch.tensor(row.ids)), self.values(ids, hidden)[start:], distribution.entropy()

    def read_reference(self, row: Row) -> list[float]:
        ids, start = torch.tensor([row.prompt + row.ids]), len(row.prompt) - 1
        logits = self.reference(ids).logits[0, start:-1] / self.args.temperature
        return torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(row.ids)).tolist()


def kl(p: float, q: float, estimator: str) -> float:
    return {"k1": p - q, "k2": (p - q) ** 2 / 2, "k3": math.exp(q - p) - 1 - (q - p)}[estimator]


def whitened(rows: list[list[float]], keep_mean: bool) -> list[list[float]]:
    everything = [value for row in rows for value in row]
    mean, variance = statistics.fmean(everything), statistics.variance(everything)
    return [[(x - mean) / math.sqrt(variance + 1e-8) + keep_mean * mean for x in row] for row in rows]


class Twin:
    """What PPO learns, and from what."""

    def __init__(self, trainer: Any, funcs: list[Callable[[list[int]], Any]]) -> None:
        self.args, self.funcs = trainer.args, funcs
        self.weights = trainer.args.reward_weights or [1.0] * len(funcs)
        self.models = Models(trainer)
        self.kl_coef = trainer.args.kl_coef
        self.scores_so_far: list[float] = []

    # Credit

    def reward(self, rows: list[Row]) -> None:
        scores = []
        for row in rows:
            row.rewards, total = [0.0] * len(row.ids), 0.0
            answers = [func(row.ids) for func in self.funcs]
            row.scored = any(answer is not None for answer in answers)
            for weight, answer in zip(self.weights, answers, strict=True):
                if isinstance(answer, list):
                    pairs = answer if answer and isinstance(answer[0], tuple) else list(enumerate(answer))
                else:
                    pairs = [(len(row.ids) - 1, answer or 0.0)]
                for position, value in pairs:
                    row.rewards[position] += weight * value
                    total += weight * value
            row.right = row.scored and total >= self.args.success_threshold
            scores += [total] * row.scored
        self.scores_so_far += scores
        among = {"none": [], "batch": scores, "running": self.scores_so_far}[self.args.reward_scaling]
        deviation = statistics.stdev(among) if among else 1.0
        clip = self.args.reward_clip or math.inf
        for row in rows:
            row.rewards = [max(-clip, min(clip, reward / deviation)) for reward in row.rewards]
            if self.args.missing_eos_penalty and row.ids[-1] != EOS:
                row.rewards[-1] -= self.args.missing_eos_penalty

    @torch.no_grad()
    def credit(self, rows: list[Row]) -> None:
        args = self.args
        self.reward(rows)
        last_values = []
        for row in rows:
            logps, values, _ = self.models.read(row)
            row.old_logps, row.old_values = logps.tolist(), values[:-1].tolist()
            last_values.append(float(values[-1]) if args.bootstrap_truncated and row.ids[-1] != EOS else 0.0)
            row.ref_logps = self.models.read_reference(row)
        earned = []
        for row in rows:
            by_step: list[float] = []
            for t, own in enumerate(row.wrote):
                if own:
                    by_step.append(-self.kl_coef * kl(row.old_logps[t], row.ref_logps[t], args.kl_estimator))
                if by_step:
                    by_step[-1] += row.rewards[t]
            earned.append(by_step)
        if args.whiten_rewards:
            earned = whitened(earned, keep_mean=True)
        advantages = []
        for row, by_step, last in zip(rows, earned, last_values, strict=True):
            values = [row.old_values[t] for t in row.steps]
            lam = max(0.0, 1 - 1 / (args.lam_alpha * len(values))) if args.lam_alpha else args.lam
            found = self.gae(by_step, values, last, lam)
            critic_lam = args.lam if args.critic_lam is None else args.critic_lam
            targets = [a + v for a, v in zip(self.gae(by_step, values, last, critic_lam), values, strict=True)]
            row.returns = targets if row.scored else values
            advantages.append(found if row.scored else [])
        if args.whiten_advantages:
            advantages = whitened(advantages, keep_mean=False)
        for row, found in zip(rows, advantages, strict=True):
            row.advantages = found or [0.0] * len(row.steps)

    def gae(self, rewards: list[float], values: list[float], last: float, lam: float) -> list[float]:
        advantages, advantage, following = [], 0.0, last
        for reward, value in zip(reversed(rewards), reversed(values), strict=True):
            delta = reward + self.args.gamma * following - value
            advantage, following = delta + self.args.gamma * lam * advantage, value
            advantages.insert(0, advantage)
        return advantages

    # Loss

    def row_loss(self, row: Row) -> dict[str, torch.Tensor]:
        """Sums over the tokens of a row."""
        args = self.args
        logps, values, entropies = (part[row.steps] for part in self.models.read(row))
        old = torch.tensor([row.old_logps[t] for t in row.steps])
        ratio = (logps - old).exp()
        if args.importance_sampling_level == "sequence_token":
            mean = (logps - old).mean().exp().detach()
            ratio = mean * (logps - logps.detach()).exp()
        advantages, returns = torch.tensor(row.advantages), torch.tensor(row.returns)
        clipped = ratio.clamp(1 - args.epsilon, 1 + (args.epsilon_high or args.epsilon))
        policy = -torch.minimum(ratio * advantages, clipped * advantages)
        if args.beta:
            difference = torch.tensor([row.ref_logps[t] for t in row.steps]) - logps
            divergence = difference.exp() - difference - 1
            policy = policy + args.beta * divergence * (ratio if args.use_bias_correction_kl else 1.0)
        before = torch.tensor([row.old_values[t] for t in row.steps])
        squares = (values - returns) ** 2
        if args.cliprange_value is not None:
            near = before + (values - before).clamp(-args.cliprange_value, args.cliprange_value)
            squares = torch.maximum(squares, (near - returns) ** 2)
        from_old = (logps - old).exp() - 1 - (logps - old)
        return {
            "policy": policy.sum(),
            "tokens": torch.tensor(float(len(row.steps))),
            "value": squares.sum() / 2,
            "entropy": entropies.sum(),
            "old_kl": from_old.sum(),
            "nll": -logps.sum() * row.right,
        }

    def loss(self, micro_batches: list[list[Row]], tokens: float, right: float) -> torch.Tensor:
        """Of an optimizer step that is due this many tokens, and tokens of right completions."""
        args = self.args
        found = [[self.row_loss(row) for row in rows] for rows in micro_batches]
        rows = [row for batch in found for row in batch]

        def total(name: str, of: list[dict[str, torch.Tensor]] = rows) -> torch.Tensor:
            return torch.stack([row[name] for row in of]).sum()

        loss = total("policy") / tokens
        if args.loss_type == "grpo":
            loss = torch.stack([row["policy"] / row["tokens"] for row in rows]).mean()
        if args.loss_type == "dr_grpo":
            loss = total("policy") / (len(rows) * args.max_completion_length)
        loss = loss + args.vf_coef * total("value") / tokens + args.old_kl_coef * total("old_kl") / tokens
        if args.positive_nll_coef:
            loss = loss + args.positive_nll_coef * total("nll") / right
        if args.entropy_coef:  # a mean over the tokens of each micro-batch, in TRL
            means = [total("entropy", batch) / total("tokens", batch) for batch in found]
            loss = loss - args.entropy_coef * torch.stack(means).mean()
        if args.ptx_coef:
            ids = torch.tensor([PTX])
            logits = self.models.policy(ids).logits[0, :-1]
            loss = loss + args.ptx_coef * functional.cross_entropy(logits, ids[0, 1:])
        return loss


# Runs


class Steps(TrainerCallback):
    """Weights before each optimizer step, and its gradient by name."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.before.append(tiny.weights(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def tools(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """An environment writes in the middle of some completions, at the start of some, and at the end of others."""
    torch.manual_seed(trainer._step)
    lengths = torch.randint(3, 9, (len(prompts),)).tolist()
    ids = [torch.randint(4, 24, (length,)).tolist() for length in lengths]
    masks = []
    for i, length in enumerate(lengths):
        mask = [1] * length
        mask[{0: 0, 1: 1, 2: length - 1}[i % 3]] = 0
        masks.append(mask)
    return {
        "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
        "completion_ids": ids,
        "logprobs": None,
        "env_mask": masks,
    }


def value_model() -> Any:
    torch.manual_seed(1)
    config = copy.deepcopy(tiny.qwen2().config)
    config.num_labels = 1
    return Qwen2ForSequenceClassification(config)


PTX = [5, 9, 4, 17, 2]


@dataclass
class Case:
    """Settings, reward functions, arguments of the trainer, and a metric that shows that something happened."""

    settings: dict[str, Any] = field(default_factory=dict)
    funcs: list[Callable[[list[int]], Any]] = field(default_factory=lambda: [outcome])
    arguments: dict[str, Any] = field(default_factory=dict)
    shows: str | None = None


CASES = {
    "defaults": Case(shows="val/clipfrac_avg"),
    "several epochs": Case({"num_iterations": 2, "updates_per_generation": 1}, shows="clip_ratio/region_mean"),
    "mlp": Case({"critic_head": "mlp", "critic_trunk_grad": 0.5}),
    "shared trunk": Case({"critic_trunk_grad": 1.0, "vf_coef": 0.5}),
    "model": Case({"critic": "model"}),
    "value model": Case({"critic": "model", "critic_learning_rate": 1e-3}, arguments={"value_model": value_model}),
    "no clip of values": Case({"cliprange_value": None}),
    "kl k2": Case({"kl_coef": 0.3, "kl_estimator": "k2"}, shows="objective/kl"),
    "kl k3": Case({"kl_coef": 0.3, "kl_estimator": "k3"}, shows="objective/kl"),
    "kl in the loss": Case({"kl_coef": 0.0, "beta": 0.2}, shows="kl"),
    "no kl": Case({"kl_coef": 0.0}),
    "kl from the old policy": Case({"old_kl_coef": 0.5}, shows="policy/old_kl"),
    "entropy": Case({"entropy_coef": 0.05}),
    "positive nll": Case({"positive_nll_coef": 0.3}),
    "positive nll by mini-batch": Case({"positive_nll_coef": 0.3, "token_normalization": "mini_batch"}),
    "ptx": Case(
        {"ptx_coef": 0.7},
        arguments={"ptx_dataset": Dataset.from_dict({"input_ids": [PTX]})},
        shows="loss/ptx_avg",
    ),
    "raw advantages": Case({"whiten_advantages": False}),
    "whitened rewards": Case({"whiten_rewards": True, "whiten_advantages": False}),
    "discount": Case({"gamma": 0.9, "lam": 0.5}),
    "monte carlo": Case({"lam": 1.0}),
    "temporal difference": Case({"lam": 0.0}),
    "vapo": Case(
        {
            "num_generations": 4,
            "lam_alpha": 0.4,
            "critic_lam": 1.0,
            "epsilon_high": 0.28,
            "positive_nll_coef": 0.1,
            "token_normalization": "mini_batch",
            "cliprange_value": None,
            "kl_coef": 0.0,
        }
    ),
    "adaptive lambda": Case({"lam_alpha": 0.4, "critic_lam": 1.0, "epsilon_high": 0.28}),
    "two lambdas": Case({"lam": 0.5, "critic_lam": 1.0}),
    "bootstrapped": Case({"bootstrap_truncated": True, "gamma": 0.9}, shows="completions/clipped_ratio"),
    "missing eos": Case({"missing_eos_penalty": 1.5}, shows="completions/clipped_ratio"),
    "scaled by the batch": Case({"reward_scaling": "batch", "whiten_advantages": False}),
    "scaled by all so far": Case({"reward_scaling": "running", "whiten_advantages": False}),
    "clipped": Case({"reward_clip": 0.4, "whiten_advantages": False}),
    "scaled, clipped, punished": Case(
        {"reward_scaling": "running", "reward_clip": 0.7, "missing_eos_penalty": 1.0, "whiten_advantages": False}
    ),
    "a reward a token": Case(funcs=[parity]),
    "steps": Case({"whiten_advantages": False}, funcs=[milestones]),
    "several functions": Case(
        {"reward_weights": [0.5, 2.0, -1.0], "whiten_advantages": False}, funcs=[milestones, outcome, parity]
    ),
    "some don't apply": Case({"reward_weights": [0.5, 2.0]}, funcs=[sometimes_by_step, sometimes]),
    "none applies": Case({"reward_clip": 0.6, "whiten_advantages": False}, funcs=[sometimes]),
    "steps, scaled and clipped": Case({"reward_scaling": "batch", "reward_clip": 0.5}, funcs=[milestones, outcome]),
    "tools": Case({"whiten_advantages": False}, funcs=[parity, outcome], arguments={"rollout_func": tools}),
    "tools, with everything": Case(
        {"whiten_rewards": True, "lam_alpha": 0.4, "positive_nll_coef": 0.3, "old_kl_coef": 0.5},
        funcs=[parity, outcome],
        arguments={"rollout_func": tools},
    ),
    "groups": Case({"num_generations": 4}),
    "row means": Case({"loss_type": "grpo"}),
    "dr_grpo": Case({"loss_type": "dr_grpo"}),
    "gspo-token": Case({"importance_sampling_level": "sequence_token", "epsilon": 3e-4, "epsilon_high": 4e-4}),
    "temperature": Case({"temperature": 0.7}),
}


def run(case: Case, tmp_path: Any, **more: Any) -> tuple[Any, Steps]:
    """16 rows a generation batch; two optimizer steps of two micro-batches of four rows."""
    arguments = {name: value() if name == "value_model" else value for name, value in case.arguments.items()}
    steps = Steps()
    settings = {
        "num_generations": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "updates_per_generation": 2,
        "num_iterations": 1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "critic_learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "max_steps": 4,
        "kl_coef": 0.1,
        **case.settings,
        **more,
    }
    trainer = tiny.trainer(
        tiny.recorded(PPOTrainer),
        tmp_path,
        [as_reward(f) for f in case.funcs],
        {**arguments, "callbacks": [steps]},
        **settings,
    )
    with torch.no_grad():  # a critic that says something from the start
        generator = torch.Generator().manual_seed(3)
        for name, parameter in trainer.critic.named_parameters():
            if not name.startswith("backbone."):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    trainer.train()
    return trainer, steps


@dataclass
class Expected:
    """Of an optimizer step: its loss, the value loss a token, and the gradient by name."""

    loss: float
    value_loss: float
    gradient: dict[str, torch.Tensor]


def expected_steps(trainer: Any, steps: Steps, case: Case) -> list[Expected]:
    twin, args = Twin(trainer, case.funcs), trainer.args
    micro_batches = [rows_of(inputs) for inputs in trainer.losses]
    per_step, per_generation = args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations
    expected, known = [], {}
    for step, weights in enumerate(steps.before):
        twin.models.load(weights)
        if step * per_step % per_generation == 0:
            rows = rows_of(trainer.batches[step * per_step // per_generation].output)
            twin.credit(rows)
            known = {row.key: row for row in rows}
        window = micro_batches[step * per_step : (step + 1) * per_step]
        taken = [[known[row.key] for row in batch] for batch in window]
        counted, share = rows, per_step / args.steps_per_generation
        if args.token_normalization == "mini_batch":
            counted, share = [row for batch in taken for row in batch], 1.0
        tokens = sum(len(row.steps) for row in counted) * share
        loss = twin.loss(taken, tokens, sum(len(row.steps) for row in counted if row.right) * share)
        parameters = twin.models.parameters()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        by_row = [twin.row_loss(row) for batch in taken for row in batch]
        value_loss = float(sum(row["value"] for row in by_row) / sum(row["tokens"] for row in by_row))
        gradient = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        expected.append(Expected(loss.item(), value_loss, gradient))
    return expected


def flat(gradient: dict[str, torch.Tensor], of_critic: bool) -> torch.Tensor:
    return torch.cat([gradient[n].flatten() for n in sorted(gradient) if n.startswith("critic.") == of_critic])


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_every_step(name, tmp_path):
    case = CASES[name]
    trainer, steps = run(case, tmp_path)
    expected = expected_steps(trainer, steps, case)
    assert len(expected) == len(steps.gradients) == 4
    for log, ours, twins in zip(tiny.history(trainer), steps.gradients, expected, strict=True):
        for of_critic in (False, True):
            assert flat(twins.gradient, of_critic).norm() > 1e-4
            assert relative_error(flat(ours, of_critic), flat(twins.gradient, of_critic)) <= TOLERANCE
        assert log["loss"] == pytest.approx(twins.loss, rel=1e-4, abs=1e-5)
        assert log["loss/value_avg"] == pytest.approx(twins.value_loss, rel=1e-4)
    assert case.shows is None or any(log.get(case.shows) for log in trainer.state.log_history)
