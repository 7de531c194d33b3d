"""
Proximal Policy Optimization (https://huggingface.co/papers/1707.06347) with a critic, in its language-model form
(https://huggingface.co/papers/1909.08593, https://huggingface.co/papers/2203.02155).

What changes against GRPO: the advantage of a token comes from generalised advantage estimation on rewards and on the
values of a critic. So one completion per prompt is enough, and a reward can arrive at any token. The KL to the
reference is part of the reward. The loss on the rollouts is the clipped surrogate (eq. 7, TRL's own), plus `vf_coef`
times the value loss, minus `entropy_coef` times the entropy (eq. 9).

The critic is part of the policy's engine ([`~trl_ext.roles.critic`]); its values come out of the forward passes that
compute log-probabilities anyway.

Where what is:

| what | where |
|---|---|
| arguments, and what is refused | `ppo_config.py`; those of TRL 1.12 in `trl_1_12.py` |
| models and data sets, and what is refused | `ppo_inputs.py` |
| kinds of critics | `roles/critic.py` |
| rewards and values → advantages and returns | `objectives/credit.py` |
| the loss | `objectives/ppo.py` |
| which steps move the policy, steps that are skipped | `step_control.py` |
| the policy's learning rate | `policy_schedule.py` |
| TRL's private methods | `seams/critic.py` |
"""

import math
import textwrap
from dataclasses import asdict, fields
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import trl
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from ..errors import require
from ..metric_keys import EXPLAINED_VARIANCE, KL_PER_COMPLETION, NON_SCORE_REWARD, SCORES, VALUE_LOSS
from ..objectives.advantages import aggregate_rewards
from ..objectives.credit import (
    MEANS_OVER_TOKENS,
    CreditSettings,
    completions_that_end,
    estimate_credit,
    token_rewards,
)
from ..objectives.kl import adapted_kl_coef, kl_estimate
from ..objectives.ppo import PPOLossSettings, ppo_loss
from ..rewards.scaling import REWARD_SCALINGS, RunningScale
from ..roles.critic import Critic, critic_class
from ..rollouts.language_modelling import language_modelling_batch
from ..rollouts.replay import ReplayBuffer, append_rows
from ..rollouts.stream import PromptStream
from .arguments import bound
from .data_checks import check_data
from .grpo import GRPOTrainer
from .grpo_config import GRPOConfig
from .policy_schedule import check_warmup, with_policy_waiting
from .ppo_config import PPOConfig
from .ppo_inputs import (
    add_reward_model,
    check_models,
    check_ptx,
    resolved_config,
    take_over_token_ids,
)
from .references import check_reference
from .sampling import end_completions_at
from .seams.critic import attach_critic, metrics_of, reads_images
from .seams.evaluation import EvaluatedBatch
from .seams.references import prepared
from .step_control import NonFiniteLossError, StepControl, zero_loss
from .trl_1_12 import completions_table, report_completions


__all__ = ["NonFiniteLossError", "PPOConfig", "PPOTrainer"]

logger = get_logger(__name__)

Settings = TypeVar("Settings", CreditSettings, PPOLossSettings)


def _settings(kind: type[Settings], args: PPOConfig, **current: float) -> Settings:
    """The arguments that are the fields of `kind`; `current` holds coefficients that change during training."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind)} | current)


class PPOTrainer(GRPOTrainer):
    """
    PPO on TRL's GRPO trainer. It takes the arguments of [`~trl.GRPOTrainer`], and those of TRL 1.12's `PPOTrainer`.

    Args:
        *args, **kwargs:
            Arguments of [`~trl.GRPOTrainer`].
        reward_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            A sequence classification model with one output, as one more reward function. It reads the policy's token
            ids if the data set holds `input_ids`. Otherwise it reads text with the policy's tokenizer: plain text,
            without the end-of-sequence token that TRL's reward trainer appends (`recipes/reward.py` doesn't).
        ref_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            The reference. Default: the policy as it is now.
        value_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            A sequence classification model with one output, from which the critic starts; sets `critic="model"`.
        ptx_dataset ([`~datasets.Dataset`], *optional*):
            Text for the language-modelling term: a column `text`, `input_ids`, or `prompt` and `completion`.
        data_collator (*optional*):
            Has no effect: prompts are not padded before generation.
        curriculum ([`~trl_ext.curriculum.schedule.DifficultyCurriculum`], *optional*):
            As in [`~trl_ext.GRPOTrainer`].

    Raises:
        ValueError: before a model is loaded where possible, for what can't work together.
        NonFiniteLossError: in training, if the loss is not finite for three steps in a row. A checkpoint of what was
            trained until then is saved first.
    """

    config_class: ClassVar[type[GRPOConfig]] = PPOConfig
    args: PPOConfig
    critic: Critic
    has_value_loss = True
    needs_old_pass = True
    _tag_names = ["trl", "trl_ext", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title        = {{Proximal Policy Optimization Algorithms}},
                author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year         = 2017,
                eprint       = {arXiv:1707.06347},
            }"""),
    }

    def __init__(
        self,
        *args: Any,
        reward_model: PreTrainedModel | str | None = None,
        ref_model: PreTrainedModel | str | None = None,
        value_model: PreTrainedModel | str | None = None,
        ptx_dataset: Dataset | None = None,
        data_collator: Any = None,
        curriculum: Any = None,
        **kwargs: Any,
    ) -> None:
        given = bound(trl.GRPOTrainer, self, args, kwargs)
        config = given["args"]
        assert isinstance(config, PPOConfig)
        if data_collator is not None:
            logger.warning("data_collator has no effect: prompts are not padded before generation.")
        given["args"] = config = resolved_config(config, value_model)
        self.needs_reference, self.given_reference = bool(config.kl_coef or config.beta), ref_model
        check_reference(given, ref_model, self.needs_reference)
        check_models(config, given["model"], ref_model, value_model, reward_model)
        require(
            (given.get("optimizers") or (None, None))[1] is None,
            "`optimizers` holds a learning-rate schedule, which knows nothing of the critic's parameters. Pass "
            "(optimizer, None), and set lr_scheduler_type.",
        )
        check_ptx(config, ptx_dataset)
        on_ids = take_over_token_ids(given)
        check_data(config, given.get("train_dataset"), given.get("environment_factory"), given.get("rollout_func"))
        self._reward_model = None if reward_model is None else add_reward_model(given, reward_model, on_ids)
        self._set_up_run(config, ptx_dataset)
        kind = critic_class(config.critic)
        kind.check_policy(given["model"], given.get("peft_config"))
        self._make_critic = partial(kind.for_policy, config=config, value_model=value_model, reward_model=reward_model)
        self._own_critic = self._make_critic(given["model"]) if kind.built_before_trl else None
        super().__init__(**given, curriculum=curriculum)
        self.add_callback(self.step_control)

    def _set_up_run(self, config: PPOConfig, ptx_dataset: Dataset | None) -> None:
        """Creates the state that changes during training."""
        self.kl_coef = config.kl_coef or 0.0
        self.old_kl_coef = config.old_kl_coef
        self.step_control = StepControl(self)
        self._reward_scale = RunningScale()
        self._old_kl = (0.0, 0.0)  # sum over the tokens of the last optimizer step, and their number
        self._replay = ReplayBuffer(config.replay_capacity, config.seed)
        self._sums: torch.Tensor | None = None  # of the optimizer step that is being accumulated
        self._ptx = None if ptx_dataset is None else PromptStream(ptx_dataset, config.seed)

    def _set_up_roles(self, config: GRPOConfig) -> None:
        assert isinstance(config, PPOConfig)
        critic: Critic = self._make_critic(self.model) if self._own_critic is None else self._own_critic
        attach_critic(self, critic)
        if self._reward_model is not None:
            self._reward_model.model = prepared(self, self._reward_model.model)
        del self._make_critic, self._own_critic  # their models are held elsewhere now
        if isinstance(self.model, PeftModel) and len(self.model.active_adapters) == 1:
            logger.info(f"Roles: {self.roles}.")
        if config.stop_token_id is not None:
            end_completions_at(self, [config.stop_token_id])
        require(
            config.replay_ratio == 0 or not reads_images(self),
            "replay_ratio with images: rows of earlier batches have different numbers of them. Set replay_ratio=0.",
        )

    # Credit

    def _sum(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over all processes."""
        reduced: torch.Tensor = self.accelerator.reduce(sums, reduction="sum")
        return reduced

    @property
    def credit_settings(self) -> CreditSettings:
        """How tokens are credited now. While the policy waits, the critic's targets are Monte-Carlo returns."""
        if self.step_control.in_warmup:
            return _settings(CreditSettings, self.args, kl_coef=self.kl_coef, critic_lam=1.0)
        return _settings(CreditSettings, self.args, kl_coef=self.kl_coef)

    @property
    def may_credit_late(self) -> bool:  # type: ignore[override]
        """
        If a generation batch is one micro-batch, its first update computes what a pass of the old policy would, and
        whitening sees all of its rows. Whatever needs advantages earlier, or rows in their order, keeps the pass.
        """
        args = self.args
        return (
            args.steps_per_generation == 1
            and args.replay_ratio == 0
            and not args.log_completions
            and not (args.use_vllm and args.vllm_importance_sampling_correction)
        )

    def credit_tokens(self, output: dict[str, Any], rewards: torch.Tensor, training: bool) -> None:
        args = self.args
        step_rewards = [
            {column: reward.steps for column, reward in by_column.items()} for by_column in self.batch.step_rewards
        ]
        scores = aggregate_rewards(rewards, self.reward_weights, "sum_then_normalize", 1)  # (B,)
        of_all = self.accelerator.gather(scores)
        output["scores"] = scores
        # Kept, because rows without a token in the loss are gone when tokens are credited late
        output["mean_score"] = torch.nanmean(of_all)
        output["token_rewards"] = token_rewards(
            rewards,
            self.reward_weights,
            step_rewards,
            output["completion_mask"],
            self._ended(output),
            deviation=self.reward_deviation(of_all, training),
            clip=args.reward_clip,
            missing_eos_penalty=args.missing_eos_penalty,
        )
        if args.positive_nll_coef:
            outcomes = self.group_outcomes(rewards, 1).squeeze(1)
            output["is_right"] = (outcomes.nan_to_num(nan=-math.inf) >= args.success_threshold).float()
            if not training:
                self._set_right_share([output], per_step=1)
        if not self.batch.credits_late:
            row_means = self._estimate(output, self.batch.extras[0], training)
            self._relog("advantages", self.accelerator.gather(row_means).tolist())

    def credit_late(
        self, inputs: dict[str, Any], per_token_logps: torch.Tensor, extras: tuple[torch.Tensor, ...]
    ) -> None:
        if "token_rewards" in inputs:
            inputs["old_per_token_logps"] = per_token_logps
            self._estimate(inputs, extras[0].detach(), training=True)

    @torch.no_grad()
    def _estimate(self, output: dict[str, Any], state_values: torch.Tensor, training: bool) -> torch.Tensor:
        """
        Put advantages, returns and old values into `output`, from its token rewards and from `state_values`
        `(B, T + 1)`, before each token and after the last. Returns the mean advantage of each row.
        """
        scores, earned, mean_score = (output.pop(name) for name in ("scores", "token_rewards", "mean_score"))
        mask = output["completion_mask"] * output.get("tool_mask", 1)  # (B, T)
        credit, metrics = estimate_credit(
            earned,
            self._kl_to_reference(output, mask),
            state_values,
            output["completion_mask"],
            mask,
            self._ended(output),
            scores,
            self.credit_settings,
            self._sum,
        )
        output |= {"advantages": credit.advantages, "old_values": credit.values, "returns": credit.returns}
        metrics[SCORES] = float(mean_score)
        if self.needs_reference:
            metrics["objective/rlhf_reward"] = metrics[SCORES] + metrics[NON_SCORE_REWARD]
            metrics["objective/kl_coef"] = self.kl_coef or self.beta
        log = metrics_of(self, training)
        for name, value in metrics.items():
            log[name].append(value)
        if training:
            self.step_control.explained_variance = metrics[EXPLAINED_VARIANCE]
        if training and self.needs_reference:
            self._follow_target(metrics[KL_PER_COMPLETION], credit.completions)
        row_means: torch.Tensor = credit.advantages.sum(dim=1) / credit.mask.sum(dim=1).clamp(min=1)
        return row_means

    def _ended(self, output: dict[str, Any]) -> torch.Tensor:
        return completions_that_end(output["completion_ids"], output["completion_mask"], self.eos_token_ids)

    def reward_deviation(self, scores: torch.Tensor, training: bool) -> float:
        """What rewards are divided by, given the `scores` `(N,)` of all ranks; training moves the running scale."""

        def finite_scores() -> list[float]:
            return list(scores[scores.isfinite()].tolist())

        return REWARD_SCALINGS[self.args.reward_scaling](finite_scores, self._reward_scale, training)

    def _kl_to_reference(self, output: dict[str, Any], mask: torch.Tensor) -> torch.Tensor | None:
        """Estimates `(B, T)` of the KL to the reference; `None` if there is no reference."""
        reference = output.get("ref_per_token_logps")
        if reference is None:
            return None
        if not self.beta:
            del output["ref_per_token_logps"]  # the loss has no use for it
        return kl_estimate(output["old_per_token_logps"], reference, self.args.kl_estimator) * mask

    def _follow_target(self, kl: float, completions: int) -> None:
        """Adapt `kl_coef` or `beta` to the KL that was measured on so many completions."""
        args = self.args
        if args.kl_target is None or self.step_control.in_warmup:  # nobody follows the coefficient yet
            return
        assert args.kl_rule is not None
        coef = adapted_kl_coef(
            self.kl_coef or self.beta,
            kl,
            args.kl_target,
            args.kl_rule,
            horizon=args.kl_horizon,
            samples=completions,
            rate=args.kl_rate,
        )
        if args.kl_coef:
            self.kl_coef = coef
        else:
            self.beta = coef

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        check_warmup(self.args.critic_warmup_steps, num_training_steps)
        scheduler: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
        # A schedule that is no function of the step ("reduce_lr_on_plateau") has nothing that could wait
        if self.args.critic_warmup_steps and isinstance(scheduler, LambdaLR):
            control = self.step_control  # not the trainer, of which DeepSpeed makes a copy
            scheduler = self.lr_scheduler = with_policy_waiting(
                scheduler, self.args, num_training_steps, lambda: control.warmup_steps
            )
        return scheduler

    # Loss

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        self._follow_old_policy()
        if self.args.replay_ratio:
            self._add_replayed(micro_batches)
        if self.args.positive_nll_coef:
            by_step = self.args.token_normalization == "mini_batch"
            self._set_right_share(micro_batches, self.args.gradient_accumulation_steps if by_step else None)
        super().on_new_buffer(micro_batches)

    def _set_right_share(self, micro_batches: list[dict[str, Any]], per_step: int | None) -> None:
        """
        Put `right_share` into micro-batches: the share of correct completions in the tokens that losses are divided
        by, those of `per_step` micro-batches (`None`: of the generation batch) on all processes.
        """
        counts = []
        for batch in micro_batches:
            tokens = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum(dim=1)  # (B,)
            counts.append(torch.stack([(tokens * batch["is_right"]).sum(), tokens.sum().float()]))
        per_step = per_step or len(micro_batches)
        right, total = self._sum(torch.stack(counts).view(-1, per_step, 2).sum(dim=1)).unbind(dim=1)
        for i, batch in enumerate(micro_batches):
            batch["right_share"] = (right / total.clamp(min=1))[i // per_step]

    def _follow_old_policy(self) -> None:
        """Adapt `old_kl_coef` to the KL at the end of the generation batch that is used up."""
        args, (total, tokens) = self.args, self._old_kl
        if args.old_kl_target is not None and tokens:
            self.old_kl_coef = adapted_kl_coef(
                self.old_kl_coef, total / tokens, args.old_kl_target, "ppo", horizon=1, samples=1, rate=1
            )
            self.train_metrics["policy/old_kl_coef"].append(self.old_kl_coef)
        self._old_kl = (0.0, 0.0)

    def _add_replayed(self, micro_batches: list[dict[str, Any]]) -> None:
        fresh = list(micro_batches)
        needed = self.args.replayed_rows * len(micro_batches)
        if len(self._replay) >= needed:  # the buffers of all ranks have the same size
            rows, added = self._replay.draw(needed), 0
            for i, batch in enumerate(fresh):
                own = rows[i * self.args.replayed_rows : (i + 1) * self.args.replayed_rows]
                added += sum(int((row["completion_mask"] * row.get("tool_mask", 1)).sum()) for row in own)
                micro_batches[i] = append_rows(batch, own)
            total = self._sum(torch.tensor(added, device=self.accelerator.device))
            for batch in micro_batches:
                batch["num_items_in_batch"] = batch["num_items_in_batch"] + total
        rows_before = sum(len(batch["completion_ids"]) for batch in fresh)
        rows_now = sum(len(batch["completion_ids"]) for batch in micro_batches)
        self.train_metrics["replay/ratio"].append(1 - rows_before / rows_now)
        self._replay.add(fresh)

    def _tokens_of_step(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Divisor of a sum over the tokens of a micro-batch: TRL's normaliser of `loss_type="dapo"`."""
        tokens: torch.Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if not self.model.training:
            return tokens
        assert self.args.steps_per_generation
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def added_loss(self, loss: torch.Tensor, model: Any, inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Any:
        logps, state_values = outputs[0], outputs[3]
        training = self.model.training
        frozen = training and self.step_control.policy_is_frozen
        surrogate = loss
        if self._ptx is not None and training and not frozen:
            surrogate = surrogate + self._ptx_term(model)
        settings = _settings(PPOLossSettings, self.args, old_kl_coef=self.old_kl_coef)
        tokens = self._tokens_of_step(inputs)
        total, sums = ppo_loss(surrogate, logps, state_values[:, :-1], inputs, tokens, settings, frozen)
        if not training:
            return total
        self._observe_loss(sums, loss.detach(), total)
        return total if bool(total.isfinite()) else zero_loss(logps, state_values)

    def loss_state(self) -> dict[str, Any]:
        ptx = None if self._ptx is None else self._ptx.state_dict()
        return {"sums": self._sums, "old_kl": self._old_kl, "ptx": ptx}

    def load_loss_state(self, state: dict[str, Any]) -> None:
        self._sums, self._old_kl = state["sums"], state["old_kl"]
        if self._ptx is not None:
            self._ptx.load_state_dict(state["ptx"])

    def _ptx_term(self, model: Any) -> torch.Tensor:
        """γ times the next-token loss on `ptx_dataset` (2203.02155, eq. 2), as a part of the step's loss."""
        # DDP allows one forward pass for each backward pass. The module below it has the same parameters, whose
        # gradients DDP reduces.
        below = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
        lm_loss: torch.Tensor = below(**self._ptx_batch()).loss
        mean = self._sum(lm_loss.detach()) / self.accelerator.num_processes
        self.train_metrics["loss/ptx_avg"].append(mean.item())
        return self.args.ptx_coef * lm_loss / self.current_gradient_accumulation_steps

    def _ptx_batch(self) -> dict[str, torch.Tensor]:
        assert self._ptx is not None
        size = self.args.ptx_batch_size or self.args.per_device_train_batch_size
        rows = self._ptx.take(size * self.accelerator.num_processes)
        start = self.accelerator.process_index * size
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        return language_modelling_batch(
            rows[start : start + size], tokenizer, self.args.ptx_max_length, self.accelerator.device
        )

    def _observe_loss(self, sums: dict[str, torch.Tensor], policy_loss: torch.Tensor, total: torch.Tensor) -> None:
        """Add up the sums of an optimizer step's micro-batches. After the last, log them and decide on the step."""
        parts = torch.stack([*sums.values(), policy_loss.float(), (~total.isfinite()).float()])
        self._sums = parts if self._sums is None else self._sums + parts
        if not self.accelerator.sync_gradients:
            return
        *found, policy, broken = self._sum(self._sums).tolist()
        of_step = dict(zip(sums, found, strict=True))
        self._sums, self.step_control.loss_is_finite = None, broken == 0
        if broken:
            return
        waiting = self.step_control.in_warmup
        self._old_kl = (0.0, 0.0) if waiting else (of_step["old_kl"], of_step["tokens"])
        metrics, tokens = self.train_metrics, max(of_step["tokens"], 1)
        metrics[VALUE_LOSS].append(of_step["value_loss"] / tokens)
        metrics["loss/policy_avg"].append(policy / self.accelerator.num_processes)
        metrics["val/clipfrac_avg"].append(of_step["clipped_values"] / tokens)
        metrics["policy/approxkl_avg"].append(of_step["approximate_kl"] / tokens)
        metrics["val/ratio"].append(of_step["ratio"] / tokens)
        if self.args.critic_warmup_steps:
            metrics["val/warmup"].append(float(waiting))
        if self.args.old_kl_coef:
            metrics["policy/old_kl"].append(of_step["old_kl"] / tokens)

    def complete_batch(self, batch: EvaluatedBatch, inputs: Any) -> None:
        super().complete_batch(batch, inputs)
        batch.weights |= dict.fromkeys(MEANS_OVER_TOKENS, batch.weights["entropy"])

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because their loss wasn't finite."""
        return self.step_control.skipped

    # Checkpoints

    def run_state(self) -> dict[str, Any]:
        state = super().run_state() | {
            "kl_coef": self.kl_coef,
            "beta": self.beta,
            "old_kl_coef": self.old_kl_coef,
            "old_kl": self._old_kl,
            "reward_scale": asdict(self._reward_scale),
            "skipped": self.step_control.state_dict(),
        }
        return state if self._ptx is None else state | {"ptx": self._ptx.state_dict()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        super().load_run_state(state)
        if "kl_coef" not in state:  # of a trainer without a critic
            return
        self.kl_coef, self.beta, self.old_kl_coef = state["kl_coef"], state["beta"], state["old_kl_coef"]
        self._old_kl = state["old_kl"]
        self._reward_scale = RunningScale(**state["reward_scale"])
        self.step_control.load_state_dict(state["skipped"])
        if self._ptx is not None and "ptx" in state:
            self._ptx.load_state_dict(state["ptx"])

    def process_state(self) -> dict[str, Any]:
        return super().process_state() | ({"replay": self._replay.state_dict()} if self.args.replay_ratio else {})

    def load_process_state(self, state: dict[str, Any]) -> None:
        super().load_process_state(state)
        if "replay" in state:
            self._replay.load_state_dict(state["replay"])

    def load_share_of_process_states(self, states: list[dict[str, Any]]) -> None:
        super().load_share_of_process_states(states)
        replays = [state["replay"] for state in states if "replay" in state]
        if replays:
            self._replay.load_share(replays, self.accelerator.process_index, self.accelerator.num_processes)

    # Completions to look at

    def generate_completions(self, sampling: bool = False) -> None:
        """
        Print a table of prompts of `eval_dataset`, completions sampled for them at the training temperature, and
        scores, and log it to the trackers of `report_to`. Random states and metrics stay as they are. Every process
        must make the call.

        Args:
            sampling (`bool`, *optional*, defaults to `False`):
                Whether one batch is enough, instead of all of `eval_dataset`.
        """
        dataset: Any = self.eval_dataset
        if dataset is None:
            logger.warning("generate_completions() shows completions for eval_dataset, and there is none.")
            return
        table = completions_table(self, dataset, sampling)
        if self.accelerator.is_main_process:
            report_completions(self.args, self.state.global_step, table)
