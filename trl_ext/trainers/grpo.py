"""
TRL's GRPO with four axes that can be combined freely. [`GRPOConfig`] has their values.

With `all`, `group`, `token` (or `sequence`) and `ratio_clip`, the gradient is that of `trl.GRPOTrainer`, for a
fraction of the compute. With `fit_micro_batches=False` as well, all numbers are the same.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar

import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import get_callable_name

from ..errors import require, require_count, require_type
from ..metric_keys import COMPUTE_SAVED, GROUPS, MEAN_LENGTH, SELECTION
from ..objectives.advantages import (
    ESTIMATORS,
    RAGGED_GROUP,
    aggregate_rewards,
    scale_advantages,
    updated_baseline,
)
from ..objectives.ratios import IMPORTANCE_LEVELS
from ..objectives.trust_region import TRUST_REGIONS
from ..rewards.guard import RewardFunctionError
from ..roles.roles import Roles
from ..rollouts.choosers import PromptChooser, RolloutObserver
from ..rollouts.generation_batch import GenerationBatch, Rows
from ..rollouts.groups import Groups
from ..rollouts.informed import REFILL_DRAWS
from ..rollouts.micro_batches import FIT, SavedCompute, fit_step, fitted_pass
from ..rollouts.rollout import ScoredGroups
from ..rollouts.selection import (
    SELECTIONS,
    AcceptanceRate,
    FurtherRound,
    GroupSelection,
    census,
    has_variance,
    only_scored,
    outcome_rewards,
)
from ..rollouts.shared_pass import Sharing
from ..rollouts.statistics import Counters, restate_loss_metrics
from ..rollouts.stream import PromptStream, prompt_key
from .arguments import bound, model_name
from .cards import CardAdditions, complete_card
from .data_checks import check_inputs, check_loaded, check_prompts, rows_of
from .grpo_config import GRPOConfig
from .references import check_reference
from .reward_checks import check_not_negative, check_outcome_names
from .roles import roles_of
from .seams.critic import CriticSeams
from .seams.prefixes import sharing_wanted
from .seams.probes import savings_of, without_trace
from .seams.prompt_states import read_prompts
from .trust_region import confined_advantages, old_logps_with_region


logger = get_logger(__name__)

SHAPING_REWARD = "soft_overlong_punishment_reward"


def reward_name(func: Any) -> str:
    """The name that TRL will give to a reward function, known before anything is loaded."""
    return model_name(func) if isinstance(func, str | nn.Module) else get_callable_name(func)


class GRPOTrainer(CriticSeams):
    """
    [`~trl.GRPOTrainer`] with the axes of [`GRPOConfig`]. It takes the same arguments; if `args` is a
    [`~trl.GRPOConfig`], [`GRPOConfig.adopt`] converts it.

    Args:
        curriculum ([`~trl_ext.rollouts.choosers.PromptChooser`], *optional*):
            Chooses which prompts are trained on, and when, such as a [`~trl_ext.DifficultyCurriculum`]. The trainer
            uses a copy of it. `None`: TRL's order.

    Attributes:
        chooser ([`~trl_ext.rollouts.choosers.PromptChooser`]):
            The chooser of this run's prompts.
        observers (`list[RolloutObserver]`):
            Objects that see every generation batch of training. The first is the chooser; [`add_observer`] adds more.
        counters ([`~trl_ext.rollouts.statistics.Counters`]):
            Totals of the run.
        saved_compute ([`~trl_ext.rollouts.micro_batches.SavedCompute`]):
            How much less was computed than by TRL.
        exact_savings ([`~trl_ext.rollouts.exactness.ExactSavings`]):
            Which savings of compute are exact for the loss and the model.

    Raises:
        ValueError: before a model is loaded, if the data set has no prompts, or fewer than one generation batch, or
            can't be used for `rollout_selection="refill"`; or if `outcome_reward_funcs` has an unknown name.
        RewardFunctionError: in training, if a reward function fails. The trainer saves a checkpoint first.
    """

    config_class: ClassVar[type[GRPOConfig]] = GRPOConfig
    args: GRPOConfig
    _tag_names = ["trl", "trl_ext", "grpo"]

    def __init__(self, *args: Any, curriculum: PromptChooser | None = None, **kwargs: Any) -> None:
        given = bound(trl.GRPOTrainer, self, args, kwargs)
        config = given["args"]
        sample = check_inputs(config, given, curriculum)
        check_reference(given, self.given_reference, self.needs_reference or config.beta != 0.0)
        dataset = given.get("train_dataset")
        draws = REFILL_DRAWS[config.refill_draws]
        self.chooser = draws(dataset, config) if curriculum is None else curriculum.prepared(dataset, config)
        self.observers: list[RolloutObserver] = [self.chooser]
        self._add_overlong_punishment(given)
        if given.get("environment_factory") is None:
            check_outcome_names(config, [reward_name(func) for func in given["reward_funcs"]])
        self.rollout_selection = SELECTIONS[config.rollout_selection]
        self.selects = self.rollout_selection.fill is not None
        self.draws_rounds = self.rollout_selection.draws_prompts
        self.estimator = ESTIMATORS[config.advantage_estimator]
        self.level = IMPORTANCE_LEVELS[config.importance_sampling_level]
        self.trust_region = TRUST_REGIONS[config.trust_region]
        self.card = CardAdditions(papers=[e.paper for e in (self.estimator, self.trust_region) if e.paper])
        self.counters, self.saved_compute = Counters(), SavedCompute()
        self.sharing_obstacles: list[str] = []
        self._acceptance = AcceptanceRate()
        self._baseline: float | None = None
        self._copy_generator = torch.Generator().manual_seed(config.seed)
        super().__init__(**given)
        check_loaded(self, sample)
        self.importance_sampling_level = self.level.trl_level
        if self.trust_region.divergence is not None:
            self.epsilon_low = self.epsilon_high = math.inf  # TRL's loss is then the ratio times the advantage
        self._set_up_selection(config)
        self._set_up_roles(config)
        self._set_up_micro_batches(config)

    @property
    def roles(self) -> Roles:
        """Actor, critic, rewards that are models, and reference, and on which weights they are."""
        return roles_of(self)

    def _set_up_roles(self, config: GRPOConfig) -> None:
        """Adds models to the policy, and to the reference and reward models that TRL has."""

    def _set_up_selection(self, config: GRPOConfig) -> None:
        check_outcome_names(config, self.reward_func_names)  # which now include those of environments
        outcome = config.outcome_reward_funcs or [n for n in self.reward_func_names if n != SHAPING_REWARD]
        self.is_outcome = torch.tensor([name in outcome for name in self.reward_func_names])
        self.prompt_stream: PromptStream | None = None
        if self.rollout_selection.draws_prompts or self.chooser.lookahead > 1:
            self.prompt_stream = PromptStream(self.rows_seen_in_training(), seed=config.seed)
        if config.prompt_features == "hidden_states":
            self.chooser.read_prompts(partial(read_prompts, self))

    def _set_up_micro_batches(self, config: GRPOConfig) -> None:
        exact = savings_of(self)
        # A few copies are computed like other rows: that costs little, and metrics are then taken over all rows
        self.exact_savings = replace(exact, weigh_copies=exact.skip_dead and self.rollout_selection.mostly_copies)
        if config.fit_micro_batches:
            for reason in self.exact_savings.reasons:
                logger.warning(f"So that the gradient is exactly TRL's, {reason}.")
            self._set_up_sharing(config)

    def _set_up_sharing(self, config: GRPOConfig) -> None:
        self.sharing, self.sharing_obstacles = sharing_wanted(self, config.share_prefixes)

    @property
    def sharing_of_steps(self) -> Sharing | None:
        """What passes share, if it pays to bring the completions of a prompt together."""
        return self.sharing if self.sharing is not None and self.sharing.any_length else None

    @staticmethod
    def _add_overlong_punishment(given: dict[str, Any]) -> None:
        """Append TRL's soft overlong punishment to the reward functions, unless the user passes one."""
        config, funcs = given["args"], given["reward_funcs"]
        rewarded = funcs or given.get("environment_factory") is not None
        if not config.soft_punish_cache or not rewarded or SHAPING_REWARD in map(reward_name, funcs):
            return
        funcs.append(get_soft_overlong_punishment(config.max_completion_length, config.soft_punish_cache))
        if config.reward_weights is not None:
            given["args"] = copy.copy(config)
            given["args"].reward_weights = [*config.reward_weights, 1.0]
        classes = given.get("reward_processing_classes")
        if classes is not None:
            given["reward_processing_classes"] = [*(classes if isinstance(classes, list) else [classes]), None]

    # Prompts

    @property
    def progress(self) -> float:
        """Share of the run that is over, in [0, 1]."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def add_observer(self, observer: RolloutObserver) -> None:
        """
        Add an observer. It sees every generation batch of training, and checkpoints hold its state.

        Raises:
            ValueError: if the trainer has an observer with the same key.
        """
        require(
            not observer.key or observer.key not in [other.key for other in self.observers],
            f"This trainer has an observer with the key {observer.key!r} already. Give this one a different key.",
        )
        self.observers.append(observer)

    def check_rows(self, rows: Rows) -> None:
        if self.rollout_func is None:  # which may take prompts of any form
            check_prompts("A generation batch", rows, may_lack_them=self.environment_factories is not None)

    def _first_of_groups(self, rows: Rows) -> Rows:
        """The data set rows of all ranks, one for each group, from this rank's rows for each completion."""
        start = self.accelerator.process_index * len(rows)
        gathered: Rows = gather_object(rows[-start % self.num_generations :: self.num_generations])
        return gathered

    def completion_length(self) -> int:
        return self.chooser.completion_length(self.max_completion_length, self.progress)

    def rows_to_generate(self, rows: Rows) -> Rows:
        """Replaces the dealt prompts that the chooser passes over by those that it chooses instead, slot by slot."""
        for observer in self.observers:
            observer.begin(self)
        if not self.chooser.needs_rows:
            return rows
        dealt = self._first_of_groups(rows)
        assert self.prompt_stream is not None
        further = self.prompt_stream.draw(
            (self.chooser.lookahead - 1) * len(dealt), exclude=set(map(prompt_key, dealt))
        )
        candidates = dealt + further
        chosen = self._choose(candidates, count=len(dealt), dealt=len(dealt))
        kept, replacements = set(chosen), iter([candidates[i] for i in chosen if i >= len(dealt)])
        if len(kept) < len(chosen):  # some prompts get several slots, next to each other
            self.batch.group_rows = [candidates[i] for i in chosen]
        else:
            self.batch.group_rows = [row if i in kept else next(replacements) for i, row in enumerate(dealt)]
        self.batch.replaced = sum(i not in kept for i in range(len(dealt)))
        return self._local_rows(self.batch.group_rows, self.num_generations)

    def _choose(self, rows: Rows, count: int, dealt: int = 0) -> list[int]:
        """The first process's choice: others may have processors on which a prediction is rounded differently."""
        chosen: list[int] = broadcast_object_list([self.chooser.choose(rows, count, self.progress, dealt)])[0]
        return chosen

    def _local_rows(self, rows: Rows, num_generations: int) -> Rows:
        """This rank's part of `rows`, with a copy for each completion, because rollouts write into their rows."""
        repeated = [row for row in rows for _ in range(num_generations)]
        per_rank = len(repeated) // self.accelerator.num_processes
        start = self.accelerator.process_index * per_rank
        return [copy.deepcopy(row) for row in repeated[start : start + per_rank]]

    def _observe(self, rows: Rows, rewards: torch.Tensor) -> list[bool]:
        """
        Show a round of generation to all observers. `rows` are those of its slots, if they are known, and `rewards`
        `(N, F)` those of all ranks. Returns for each slot whether its group is live.
        """
        numbers = self.batch.count_prompts(len(rewards) // self.num_generations, rows)
        groups = Groups(numbers, self.num_generations)
        outcomes = self.group_outcomes(groups.padded(rewards), groups.size)
        live: list[bool] = has_variance(outcomes).tolist()
        of_prompts = list(dict(zip(numbers, rows, strict=False)).values())
        for observer in self.observers:
            observer.observe(of_prompts, outcomes.cpu(), live)
        return [live[number] for number in numbers]

    # Selection

    def group_outcomes(self, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        """
        The outcome rewards of groups, see [`~trl_ext.rollouts.selection.outcome_rewards`].

        Args:
            rewards (`torch.Tensor` of shape `(N, F)`):
                Rewards of N completions by F functions, NaN = not applicable.
            num_generations (`int`):
                Size of a group.

        Returns:
            `torch.Tensor` of shape `(N / num_generations, num_generations)`.
        """
        return outcome_rewards(rewards, self.reward_weights, self.is_outcome).view(-1, num_generations)

    def judged(self, rewards: torch.Tensor) -> torch.Tensor:
        return only_scored(rewards, self.is_outcome)

    def select_groups(self) -> GroupSelection:
        first = self.batch.rounds[0]
        live = self._observe(self.batch.group_rows, first.rewards)
        self._acceptance.observe(sum(live), len(live))
        selection = GroupSelection(live, self.num_generations, rows_per_rank=len(first.rollouts))
        assert self.rollout_selection.fill is not None
        self.rollout_selection.fill(selection, self._further_rounds(selection), self._copy_generator)
        if not any(selection.live):
            self._warn_without_variance()
        return selection

    def _further_rounds(self, selection: GroupSelection) -> Iterator[FurtherRound]:
        """Generate for new prompts until no slot is dead, or no round or no prompt is left."""
        assert self.prompt_stream is not None
        processes, size, rounds = self.accelerator.num_processes, self.num_generations, self.batch.rounds
        # With a multiple of this number of prompts, every rank has the same number of rows
        multiple = processes // math.gcd(processes, size)
        drawn: set[str] | None = None
        for _ in range(self.args.max_refill_rounds):
            missing = len(selection.dead_slots)
            if not missing:
                return
            if drawn is None:
                drawn = set(gather_object([prompt_key(rollout.row) for rollout in rounds[0].rollouts]))
            count = self._acceptance.draws_for(missing, at_most=len(selection.slots), multiple_of=multiple)
            choose = partial(self._choose, count=count)
            rows = self.prompt_stream.draw(count, drawn, choose, self.chooser.lookahead)
            rows = rows[: len(rows) // multiple * multiple]
            if not rows:
                return
            scored = self.score_round(self._local_rows(rows, size))
            rounds.append(scored)
            live = self._observe(rows, scored.rewards)
            self._acceptance.observe(sum(live), len(live))
            yield FurtherRound(len(rounds) - 1, live, rows_per_rank=len(scored.rollouts))

    def _warn_without_variance(self) -> None:
        self.counters.batches_without_variance += 1
        times = self.counters.batches_without_variance
        if times & (times - 1) == 0:  # the 1st, 2nd, 4th, 8th, …
            logger.warning(
                f"No group of this generation batch has reward variance after {len(self.batch.rounds)} round(s) of "
                f"generation ({times} such batch(es) so far). The batch is used as TRL would use it. Check whether "
                "the prompts are all too easy or all too hard, and whether the reward differs between completions."
            )

    # Advantages and ratios

    def shaped_rewards(self, rewards: torch.Tensor, output: dict[str, Any], training: bool) -> torch.Tensor:
        """
        Where a method changes the rewards `(N,)` of all ranks before advantages are estimated from them. `output` are
        TRL's tensors of this rank's rows.
        """
        return rewards

    def estimate_advantages(
        self, rewards: torch.Tensor, output: dict[str, Any], training: bool
    ) -> torch.Tensor | None:
        if self.estimator.computed_by == "critic":  # advantages of tokens, set in `credit_tokens`
            return rewards.new_zeros(len(rewards))
        in_slot = self.num_generations if training else self.num_generations_eval
        groups = Groups(self.batch.selected_prompts or range(len(rewards) // in_slot), in_slot)
        estimator = self.estimator if groups.equal or self.estimator.function is not None else RAGGED_GROUP
        if estimator.function is None:
            return None
        weights, aggregation = self.reward_weights, self.multi_objective_aggregation
        reward = groups.unpadded(aggregate_rewards(groups.padded(rewards), weights, aggregation, groups.size))
        reward = self.shaped_rewards(reward, output, training)
        if not self.estimator.takes_negative:
            check_not_negative(self.args.advantage_estimator, reward, rewards, self.reward_func_names)
        available = {"num_generations": groups.size, "baseline": self._baseline}
        padded = groups.padded(reward)
        advantages = estimator.function(padded, **{name: available[name] for name in estimator.needs})
        momentum = self.args.reinforce_baseline_momentum
        if momentum is not None and training:
            self._baseline = updated_baseline(self._baseline, reward, momentum)
        return groups.weighted(groups.unpadded(scale_advantages(advantages, padded, self.scale_rewards, groups.size)))

    def advantages_for_loss(
        self, per_token_logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor
    ) -> torch.Tensor | None:
        if self.trust_region.divergence is None:
            return None
        return confined_advantages(self, per_token_logps.detach(), inputs, mask)

    def old_logps_for_loss(
        self, per_token_logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor
    ) -> torch.Tensor | None:
        if self.trust_region.divergence is not None:
            return old_logps_with_region(per_token_logps.detach(), inputs)
        if self.level.old_logps is None:
            return None
        old = inputs.get("old_per_token_logps")
        if old is None:  # TRL leaves them out if the policy has not changed since it sampled
            old = per_token_logps.detach()
        inputs.setdefault("sampling_per_token_logps", old)  # TRL's off-policy mask reads the real ones
        return self.level.old_logps(per_token_logps, old, mask)

    # Micro-batches

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        if self.args.token_normalization == "mini_batch":
            self._normalize_by_mini_batch(micro_batches)
        if self.args.fit_micro_batches:
            saved = SavedCompute()
            micro_batches[:] = self.fit(micro_batches, self.buffer_step_slices(), saved)
            self.train_metrics[COMPUTE_SAVED].append(saved.share)
            for name, share in saved.shares.items() if self.sharing is not None else ():
                self.train_metrics[f"{COMPUTE_SAVED}_{name}"].append(share)
            self.saved_compute += saved

    def _normalize_by_mini_batch(self, micro_batches: list[dict[str, Any]]) -> None:
        per_step = self.args.gradient_accumulation_steps
        tokens = torch.stack([(b["completion_mask"] * b.get("tool_mask", 1)).sum() for b in micro_batches])
        tokens = self.accelerator.reduce(tokens.view(-1, per_step).sum(dim=1), reduction="sum")
        for i, batch in enumerate(micro_batches):
            # Scaled up to the generation batch, because TRL's loss scales this number down to an optimizer step
            batch["num_items_in_batch"] = tokens[i // per_step] * (len(micro_batches) / per_step)

    def fit(
        self, micro_batches: list[dict[str, Any]], slices: list[tuple[int, int]], saved: SavedCompute
    ) -> list[dict[str, Any]]:
        """
        Deal the rows of TRL's micro-batches again. Must be called on every process.

        Args:
            micro_batches (`list[dict]`):
                TRL's micro-batches. They are not changed.
            slices (`list[tuple[int, int]]`):
                Parts of them that share an optimizer step, see [`~trl_ext.rollouts.packing.step_slices`].
            saved ([`SavedCompute`]):
                What was saved is added to it, in place.

        Returns:
            `list[dict]`: the same number of micro-batches.
        """
        fitted: list[dict[str, Any]] = []
        for start, stop in slices:
            step, multiple = micro_batches[start:stop], self.columns_multiple
            fitted += fit_step(
                step, self.exact_savings, self.accelerator, self.loss_type, multiple, saved, self.sharing_of_steps
            )
        return fitted

    @property
    def columns_multiple(self) -> int:
        """TRL's `pad_to_multiple_of`, as a number."""
        return int(self.pad_to_multiple_of or 1)

    def pass_without_loss(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.args.fit_micro_batches:
            # Sharded weights are gathered in every pass, so that all processes must make as many of them
            sharing = self.sharing_of_steps if self.accelerator.num_processes == 1 else None
            forward = partial(fitted_pass, forward, self.exact_savings, self.columns_multiple, sharing=sharing)
        return super().pass_without_loss(forward, *args, **kwargs)

    def restate_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        fit = inputs.get(FIT)
        if fit is None:
            return loss
        by_row = self.importance_sampling_level == "sequence"
        savings, has_kl = self.exact_savings, self.beta != 0
        restate_loss_metrics(self.train_metrics, fit, by_row=by_row, savings=savings, loss_has_kl=has_kl)
        return loss * fit.scale

    @property
    def fewest_rows(self) -> int:
        return self.exact_savings.fewest_rows

    # Metrics, checkpoints

    def on_rollouts(self, output: dict[str, Any], batch: GenerationBatch) -> None:
        metrics, counters = self.train_metrics, self.counters
        per_batch = len(output["advantages"]) * self.accelerator.num_processes
        completions = sum(len(scored.rewards) for scored in batch.rounds) or per_batch
        counters.generated_tokens += round(metrics[MEAN_LENGTH][-1] * completions)
        counters.trained_tokens += int(output["num_items_in_batch"])
        counters.generation_rounds += len(batch.rounds) or 1
        if not self.args.is_neutral:
            for name, total in asdict(counters).items():
                metrics[f"{SELECTION}{name}"] = [total]
        if batch.selection is not None:
            self._log_selection(batch, batch.selection)
        for observer in self.observers:
            observer.end(self, batch)
        if batch.selection is None:  # with a selection, every round was observed when it was scored
            assert batch.rewards is not None
            self._observe(batch.group_rows, batch.rewards)

    def _log_selection(self, batch: GenerationBatch, selection: GroupSelection) -> None:
        metrics = self.train_metrics
        groups = batch.generated_groups(self.num_generations)
        rewards = groups.padded(torch.cat([scored.rewards for scored in batch.rounds]))
        counts = census(self.group_outcomes(rewards, groups.size), self.args.success_threshold)
        counts["kept"] = batch.kept_groups
        counts["surplus"] = selection.surplus
        counts["duplicated"] = sum(source != slot for slot, source in enumerate(selection.sources))
        for name, value in counts.items():
            metrics[f"{GROUPS}{name}"].append(value)
        metrics[f"{SELECTION}rounds"].append(len(batch.rounds))
        metrics[f"{SELECTION}acceptance"].append(self._acceptance.rate)

    def closing_metrics(self) -> dict[str, float]:
        return {key: value for observer in self.observers for key, value in observer.closing_metrics().items()}

    def run_state(self) -> dict[str, Any]:
        state = {
            "counters": asdict(self.counters),
            "saved": asdict(self.saved_compute),
            "acceptance": asdict(self._acceptance),
            "baseline": self._baseline,
            "duplicates": self._copy_generator.get_state(),
            "parts": self.memory_fallback.parts,
        }
        if self.prompt_stream is not None:
            state["refill_stream"] = self.prompt_stream.state_dict()
        return state | {observer.key: observer.state_dict() for observer in self.observers if observer.key}

    def load_run_state(self, state: dict[str, Any]) -> None:
        self.counters = Counters(**state["counters"])
        self.saved_compute = SavedCompute(**state["saved"])
        self._acceptance = AcceptanceRate(**state["acceptance"])
        self._baseline = state["baseline"]
        self._copy_generator.set_state(state["duplicates"].cpu())
        self.memory_fallback.parts = state.get("parts", 1)
        if self.prompt_stream is not None and "refill_stream" in state:
            self.prompt_stream.load_state_dict(state["refill_stream"])
        for observer in self.observers:
            if observer.key in state:
                observer.load_state_dict(state[observer.key])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card with what is wrong in it put right, followed by what `self.card` adds."""
        super().create_model_card(*args, **kwargs)
        complete_card(self, self.card)

    # Rollouts without training

    def roll_out(self, rows: Rows | Dataset, num_generations: int, seed: int | None = None) -> ScoredGroups:
        """
        Generate and score completions without training on them. Random states and metrics are left unchanged.

        Args:
            rows (`list[dict]` or [`~datasets.Dataset`]):
                Data set rows, the same on every rank.
            num_generations (`int`):
                Number of completions for each row.
            seed (`int`, *optional*):
                Seed of the sampling. `None`: the current random state is used.

        Returns:
            [`~trl_ext.rollouts.rollout.ScoredGroups`]

        Raises:
            TypeError: if `rows` are no rows.
            ValueError: if there are none, or if one has no prompt that can be read.
            RewardFunctionError: if a reward function fails. The trainer saves a checkpoint first.
        """
        rows = rows_of(rows)
        require_count("num_generations", num_generations)
        require_type("seed", seed, int | None, "Pass a whole number, or None.")
        processes = self.accelerator.num_processes
        # With a multiple of this number of prompts, every rank has the same number of rows
        multiple = processes // math.gcd(processes, num_generations)
        padded = rows + rows[:1] * (-len(rows) % multiple)
        try:
            with without_trace(self, num_generations, seed):
                scored = self.score_round(self._local_rows(padded, num_generations))
        except RewardFunctionError as error:  # raised on every rank
            self.save_before_stopping(error)
            raise
        tokens = sum(sum(r.tool_mask) if r.tool_mask else len(r.completion_ids) for r in scored.rollouts)
        rewards = scored.rewards[: len(rows) * num_generations].view(len(rows), num_generations, -1)
        total = self.accelerator.reduce(torch.tensor(tokens, device=self.accelerator.device), reduction="sum")
        return ScoredGroups(rewards, self.reward_func_names, int(total), scored.rollouts)
