"""
RLOO: REINFORCE with a leave-one-out baseline (https://huggingface.co/papers/2402.14740), as `trl.RLOOTrainer` has it.

The baseline of a completion is the mean reward of the other completions of its prompt (section 2.3). Against GRPO,
these things change:

- A whole completion is one action. Its reward is R − β·log(π_old(o)/π_ref(o)): the KL to the reference stands in the
  reward (eq. 1), summed over the completion's tokens, and not in the loss.
- Advantages are not divided by the standard deviation of their group.
- The importance ratio is the one of the whole completion, π_θ(o)/π_old(o), clipped to 1 ± `epsilon`, and the loss is
  −1/N Σ_i min(r_i A_i, clip(r_i) A_i), a mean over completions of sums over tokens: long completions weigh more than
  with GRPO. With one optimizer step for each generation batch every ratio is 1, and the gradient is that of REINFORCE.

It is a preset on the engine's axes. `advantage_estimator="reinforce"` makes it REINFORCE with a KL in the reward,
whose baseline is a running mean.
"""

import textwrap
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
import trl

from ..errors import require
from ..metric_keys import KL_PER_TOKEN
from ..objectives.advantages import ESTIMATORS, normalize_advantages
from ..objectives.kl import kl_estimate
from .arguments import adopted, bound
from .grpo import GRPOTrainer
from .grpo_config import GRPOConfig
from .seams.critic import metrics_of


@dataclass
class RLOOConfig(GRPOConfig):
    """
    [`GRPOConfig`] with every argument of [`~trl.RLOOConfig`] and its defaults. With these, the same rollouts give the
    gradient of `trl.RLOOTrainer`.

    Args:
        beta (`float`, *optional*, defaults to `0.05`):
            Weight of the KL to the reference in the reward, summed over the tokens of a completion. `0`: no reference
            is loaded.
        normalize_advantages (`bool`, *optional*, defaults to `False`):
            Whether the advantages of a generation batch get mean 0 and standard deviation 1.
        reward_clip_range (`list[float]` or `tuple[float, float]`, *optional*):
            Smallest and largest reward of a completion, before the KL is subtracted.
    """

    advantage_estimator: str = field(
        default="leave_one_out", metadata={"help": "'leave_one_out' (RLOO) or 'reinforce'."}
    )
    importance_sampling_level: str = field(
        default="sequence_product", metadata={"help": "The ratio of a whole completion, or one of GRPOConfig's."}
    )
    loss_type: str = field(default="grpo", metadata={"help": "Mean over completions."})
    num_generations: int | None = field(default=2, metadata={"help": "Completions per prompt."})
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference in the reward."})
    normalize_advantages: bool = field(
        default=False, metadata={"help": "Whether the advantages of a generation batch get mean 0 and deviation 1."}
    )
    reward_clip_range: list[float] | None = field(
        default=None, metadata={"help": "Smallest and largest reward of a completion, before the KL is subtracted."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Whether the loss corrects for the difference between vLLM and the policy."}
    )

    def _resolve_method(self) -> None:
        super()._resolve_method()
        clip = self.reward_clip_range
        require(
            clip is None or (len(clip) == 2 and clip[0] < clip[1]),
            f"reward_clip_range={clip} must be two numbers, the smallest reward and a larger one. Set for instance "
            "reward_clip_range=[-10, 10], or leave it out.",
        )
        shaping = {"beta": self.beta != 0, "normalize_advantages": self.normalize_advantages}
        shaping["reward_clip_range"] = clip is not None
        used = [f"{name}={getattr(self, name)}" for name, is_used in shaping.items() if is_used]
        estimator = ESTIMATORS.get(self.advantage_estimator)
        require(
            self.beta == 0 or estimator is None or estimator.takes_negative,
            f"beta={self.beta} subtracts a KL from the rewards, which makes some of them negative, and "
            f"advantage_estimator={self.advantage_estimator!r} divides by their mean. Set beta=0, or use "
            "GRPOConfig and GRPOTrainer, whose beta weighs a KL in the loss.",
        )
        require(
            not used or estimator is None or estimator.computed_by != "trl",
            f"{' and '.join(used)} would have no effect on the advantages that TRL computes with "
            f"advantage_estimator={self.advantage_estimator!r}. Set advantage_estimator='leave_one_out', or use "
            "GRPOConfig and GRPOTrainer, whose beta weighs a KL in the loss.",
        )

    @classmethod
    def adopt(cls, args: trl.GRPOConfig | trl.RLOOConfig) -> Self:
        """
        Take over a configuration that was written for TRL. Every argument of a [`~trl.RLOOConfig`] keeps its value;
        for a [`~trl.GRPOConfig`], see [`GRPOConfig.adopt`].

        Raises:
            TypeError: if it is a configuration of a different kind.
        """
        if isinstance(args, trl.RLOOConfig):
            return adopted(cls, args, trl.RLOOConfig, cls._taken_from_rloo)
        return super().adopt(args)

    @classmethod
    def _taken_from_rloo(cls, args: trl.RLOOConfig) -> dict[str, Any]:
        own = {f.name for f in fields(cls) if f.init}
        # TRL computes this size from `steps_per_generation`, or the reverse, and takes one of them only
        return {f.name: getattr(args, f.name) for f in fields(args) if f.name in own - {"generation_batch_size"}}


class RLOOTrainer(GRPOTrainer):
    """
    [`GRPOTrainer`] with the method and the defaults of `trl.RLOOTrainer`, see [`RLOOConfig`]. It takes the arguments
    of both; `args` may be a [`~trl.RLOOConfig`].

    Attributes:
        kl_coef (`float`):
            Weight of the KL in the reward, `args.beta`. The trainer's own `beta`, the weight of a KL in the loss, is
            0.
    """

    config_class: ClassVar[type[GRPOConfig]] = RLOOConfig
    args: RLOOConfig
    _tag_names = ["trl", "trl_ext", "rloo"]
    _name = "RLOO"
    _paper = {
        "title": "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
        "id": "2402.14740",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{ahmadian2024back,
                title        = {{Back to Basics: Revisiting REINFORCE-Style Optimization}},
                author       = {Arash Ahmadian and others},
                year         = 2024,
                eprint       = {arXiv:2402.14740},
            }"""),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        curriculum = kwargs.pop("curriculum", None)
        given = bound(trl.GRPOTrainer, self, args, kwargs)
        self.needs_reference = self.needs_old_pass = given["args"].beta != 0
        super().__init__(**given, curriculum=curriculum)

    def _set_up_roles(self, config: GRPOConfig) -> None:
        self.kl_coef, self.beta = config.beta, 0.0

    def shaped_rewards(self, rewards: torch.Tensor, output: dict[str, Any], training: bool) -> torch.Tensor:
        clip = self.args.reward_clip_range
        if clip is not None:
            rewards = rewards.clamp(*clip)
        return rewards if self.kl_coef == 0 else rewards - self.kl_coef * self._kl_of_completions(output, training)

    def _kl_of_completions(self, output: dict[str, Any], training: bool) -> torch.Tensor:
        """Estimates `(N,)` of the KL to the reference, of the completions of all ranks. Logs its mean over tokens."""
        mask = output["completion_mask"] * output.get("tool_mask", 1)  # (B, T)
        # The loss has no use for the reference
        per_token = kl_estimate(output["old_per_token_logps"], output.pop("ref_per_token_logps"), "k1") * mask
        sums = torch.stack([per_token.sum(dim=1), mask.sum(dim=1)], dim=1)
        kl, tokens = self.accelerator.gather(sums).unbind(dim=1)
        metrics_of(self, training)[KL_PER_TOKEN].append((kl.sum() / tokens.sum().clamp(min=1)).item())
        selection = self.batch.selection
        if selection is not None:
            # A slot that holds copies has their KL. Its own completions, which no model has read, are not trained on.
            rows = torch.tensor(selection.rows(selection.sources), device=kl.device)
            kl = kl * (rows == torch.arange(len(rows), device=kl.device))
        return kl

    def estimate_advantages(
        self, rewards: torch.Tensor, output: dict[str, Any], training: bool
    ) -> torch.Tensor | None:
        advantages = super().estimate_advantages(rewards, output, training)
        if advantages is None or not self.args.normalize_advantages:
            return advantages
        return normalize_advantages(advantages)
