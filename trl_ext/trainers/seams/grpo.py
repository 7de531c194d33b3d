"""
`trl.GRPOTrainer` with its private methods wrapped, never copied: what a method of ours needs of them, under names of
ours. `tests/upstream/` records the source of everything that is wrapped or leaned on here.

How a batch is selected: TRL binds environments and tools to rows, prepares images and prompts, generates, *and then*
computes log-probabilities and asks for rewards. So completions are scored as soon as `_generate` has them, further
rounds of generation start from inside it, and TRL goes on as if it had generated what was selected.
"""

import copy
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...rewards.ahead import RewardsAhead
from ...rewards.guard import FAILED, RewardFunctionError, RewardGuard, guard
from ...rewards.steps import is_by_step
from ...roles.critic import critic_of
from ...rollouts.exactness import Savings, exact_savings, has_relative_positions
from ...rollouts.exchange import RolloutExchange
from ...rollouts.micro_batches import SOURCE_ROW
from ...rollouts.packing import windows
from ...rollouts.prompts import TokenizedPrompt
from ...rollouts.rollout import Generation, Rollout, ScoredRound, generation_of, joined_generation, rollouts_of
from ...rollouts.selection import GroupSelection
from ...rollouts.statistics import pool_rounds, reward_statistics


logger = get_logger(__name__)

Rows = list[dict[str, Any]]

RUN_STATE_FILE = "trl_ext_state.pt"


class _RoundScored(Exception):
    """Leaves TRL's method once the completions are scored: rows nobody trains on cost no forward pass."""

    def __init__(self, scored: ScoredRound) -> None:
        self.scored = scored


def random_states() -> dict[str, Any]:
    """States of the generators that transformers saves in a checkpoint."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_states(states: dict[str, Any]) -> None:
    """The reverse of [`random_states`]."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def savings_of(trainer: trl.GRPOTrainer) -> Savings:
    """Which savings of compute are exact for the loss and the models of a trainer, TRL's or ours."""
    unwrap: Any = trainer.accelerator.unwrap_model
    critic = critic_of(unwrap(trainer.model))
    models = [unwrap(model) for model in (trainer.model, trainer.ref_model) if model is not None]
    models += [critic] if critic is not None and critic.reads_token_ids else []
    return exact_savings(
        trainer.loss_type,
        kl=trainer.beta != 0.0,
        entropy_terms=trainer._entropy_bonus_enabled or trainer.top_entropy_quantile < 1.0,
        aux_loss=trainer.aux_loss_enabled,
        value_loss=getattr(trainer, "has_value_loss", False),
        relative_positions=all(map(has_relative_positions, models)),
    )


def saved_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What [`GRPOSeams`] wrote into a checkpoint: `run`, and where in a generation batch it was."""
    # On the CPU first: torch takes no `cpu:0`, which is what the device of a process is called there
    state: dict[str, Any] = torch.load(
        os.path.join(checkpoint, RUN_STATE_FILE), map_location="cpu", weights_only=False
    )
    return state


def last_micro_batch(trainer: trl.GRPOTrainer) -> dict[str, Any]:
    """The micro-batch whose loss a trainer, TRL's or ours, computed last."""
    buffer: Any = trainer._buffered_inputs
    batch: dict[str, Any] = buffer[(trainer._step - 1) % len(buffer)]
    return batch


def generation_is_used_up(trainer: trl.GRPOTrainer) -> bool:
    """Whether a trainer, TRL's or ours, generates before its next micro-batch."""
    args: Any = trainer.args
    return int(trainer._step) % (args.steps_per_generation * trainer.num_iterations) == 0


class EpochSampler(Sampler[int]):
    """
    TRL's sampler with its order tied to the epoch: TRL's generator starts over when a run is resumed, so that a later
    epoch would repeat the order of the first.

    Args:
        sampler (`Sampler`):
            TRL's `RepeatSampler`.
        epoch (`Callable[[], int]`):
            The epoch that is about to be walked.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self.sampler = sampler
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class GRPOSeams(trl.GRPOTrainer):
    """
    Hooks for [`GRPOTrainer`]; all of them neutral here.

    - `selects`: whether rollouts are selected in training.
    - `rows_to_generate`: which rows are generated for, of those the loader dealt or instead of them.
    - `completion_length`: how long completions may be in training, if not `max_completion_length`.
    - `select_groups`: which groups of a generation batch are trained on.
    - `estimate_advantages`: advantages instead of TRL's.
    - `old_logps_for_loss`: old log-probabilities instead of TRL's.
    - `on_new_buffer`: changes the micro-batches that TRL has dealt.
    - `pass_without_loss`: how a generation batch goes through old policy and reference.
    - `with_extras`: what is read from the model's output beside log-probabilities.
    - `credit_tokens`: advantages by token, and whatever else rows carry to the loss.
    - `credit_late`: the same, out of the first pass of the loss, where `may_credit_late`.
    - `restate_loss`: what a micro-batch that isn't TRL's makes of TRL's loss.
    - `added_loss`: what is added to it.
    - `run_state`, `load_run_state`: what a checkpoint must hold.
    """

    selects = False
    # Whether every generation batch goes through the reference, and through the policy before its first update. TRL
    # asks for these passes only where its own loss needs them.
    needs_reference = False
    needs_old_pass = False
    # Whether a critic learns from every row
    has_value_loss = False
    # Whether the first pass of the loss over a generation batch can stand for the old policy's
    may_credit_late = False

    # Narrower than upstream's annotations: never None once a trainer exists
    args: Any
    model: Any
    reward_funcs: list[Any]
    _logs: dict[str, Any]
    num_generations: int
    num_generations_eval: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rows: Rows | None = None  # the rows that `_generate` is generating for
        self._round_only = False
        self._rounds: list[ScoredRound] = []
        self._selection: GroupSelection | None = None
        self._base_rewards: torch.Tensor | None = None  # (N, F): rewards of the batch TRL logs
        self._logged_prompts: list[Any] | None = None  # where TRL was handed others to render
        self._loss_inputs: dict[str, Any] | None = None
        self._dealt_inputs: dict[str, Any] = {}  # those of the loss, as the buffer has them
        self._credits_late = False  # the generation batch that is being made
        self._deals_apart = False
        self._window: tuple[int | None, int] = (None, 0)  # global step and micro-step at which it began
        self._before_window: dict[str, Any] = {}  # state of the run at that moment
        self._saved_step = 0
        self._step_rewards: list[dict[int, Any]] = []  # of this rank's rows, by column of the rewards
        self._extras: tuple[torch.Tensor, ...] = ()  # of the policy's pass over a generation batch
        self._loss_pass: tuple[Any, ...] = ()
        with self._asking_for_passes(kwargs["args"]):
            super().__init__(*args, **kwargs)
        self.beta = self.args.beta
        # After TRL has named the functions and added those of environments
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else guard(func, name)
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self._guards = [func for func in self.reward_funcs if isinstance(func, RewardGuard)]
        self._ahead: RewardsAhead | None = None
        if self.args.rewards_in_flight is not None:
            loop = getattr(self, "async_loop", None)  # there if one of them is async
            self._ahead = RewardsAhead(self._guards, self.args.rewards_in_flight, self.args.reward_timeout, loop)

    @contextmanager
    def _asking_for_passes(self, holder: Any) -> Iterator[None]:
        """
        Let TRL make a reference and compute what it would leave out: `holder` is what it looks at, its arguments
        while it is constructed, the trainer itself afterwards.
        """
        before = holder.beta, holder.num_iterations
        if self.needs_reference:
            holder.beta = holder.beta or 1.0  # not zero; the loss is computed elsewhere
        if self.needs_old_pass and holder is self:
            # TRL leaves out the old policy's pass where it generates for every optimizer step
            holder.num_iterations = 1 if self._credits_late else self.args.gradient_accumulation_steps + 1
        try:
            yield
        finally:
            holder.beta, holder.num_iterations = before

    @contextmanager
    def _limiting_completions(self, length: int | None) -> Iterator[None]:
        """Generate completions of at most `length` tokens. What TRL's losses and rewards divide by stays."""
        # TRL's trainer has one of the two, by how it generates
        holder: Any = self.vllm_generation if self.use_vllm else self.generation_config
        name = "max_completion_length" if self.use_vllm else "max_new_tokens"
        before = getattr(holder, name)
        try:
            if length is not None:
                setattr(holder, name, length)
            yield
        finally:
            setattr(holder, name, before)

    # Hooks

    def rows_to_generate(self, rows: Rows) -> Rows:
        """The rows of this rank's generation batch in training, given those that the loader dealt."""
        return rows

    def completion_length(self) -> int | None:
        """Tokens that a completion of this generation batch may have in training. `None`: `max_completion_length`."""
        return None

    def select_groups(self, first: ScoredRound) -> GroupSelection:
        """Decide on `self._rounds`, which starts with `first`. [`score_round`] generates more of them."""
        raise NotImplementedError

    def estimate_advantages(self, rewards: torch.Tensor, training: bool) -> torch.Tensor | None:
        """Advantages `(N,)` from the rewards `(N, F)` of all ranks, in training or evaluation. `None`: TRL's."""
        return None

    def old_logps_for_loss(
        self, per_token_logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor
    ) -> torch.Tensor | None:
        """Old log-probabilities `(B, T)` for the loss. `None`: those in `inputs`."""
        return None

    def credit_tokens(self, output: dict[str, Any], rewards: torch.Tensor, training: bool) -> None:
        """
        Change TRL's tensors of a generation batch. `rewards` `(n, F)` are those of this rank's rows; steps that a
        function rewarded are in `self._step_rewards`.
        """

    def credit_late(
        self, inputs: dict[str, Any], per_token_logps: torch.Tensor, extras: tuple[torch.Tensor, ...]
    ) -> None:
        """Change a micro-batch that `credit_tokens` has left for its first pass."""

    def on_rollouts(self, output: dict[str, Any], selection: GroupSelection | None, rounds: list[ScoredRound]) -> None:
        """Called with TRL's tensors of each generation batch in training."""

    def run_state(self) -> dict[str, Any]:
        """What a resumed run needs beside the trainer's own checkpoint."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """The reverse of [`run_state`]."""

    def process_state(self) -> dict[str, Any]:
        """What a resumed process needs of its own: written once a checkpoint, for every process."""
        return {}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """The reverse of [`process_state`]."""

    # Generation and selection

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if all(isinstance(prompt, TokenizedPrompt) for prompt in prompts):
            return [prompt.input_ids for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate(self, prompts: list[Any]) -> Generation:
        generation = self._generate_in_chunks(super()._generate, prompts)
        if not (self._round_only or (self.selects and self.model.training)):
            return generation
        scored = self._score(prompts, generation)
        if self._round_only:
            raise _RoundScored(scored)
        self._rounds = [scored]
        self._selection = selection = self.select_groups(scored)
        exchange = RolloutExchange(self._rounds, self.accelerator.process_index, self.accelerator.num_processes)
        base = selection.rows(list(range(len(selection.slots))))
        size = selection.num_generations
        keys = [(ref.round, ref.group * size + i) for ref in selection.slots for i in range(size)]
        trained_rows = selection.rows(selection.sources)
        logged = exchange.fetch(keys)
        # Where nothing is copied both are the same rows, and nothing more has to travel
        trained = logged if trained_rows == base else exchange.fetch([keys[row] for row in trained_rows])
        starts = [0, *accumulate(len(scored.rewards) for scored in self._rounds)]
        rewards = torch.cat([scored.rewards for scored in self._rounds])
        self._base_rewards = rewards[[starts[round_] + row for round_, row in keys]]
        self._step_rewards = [rollout.step_rewards for rollout in trained]
        self._bind(prompts, logged, trained)
        return generation_of(logged, trained)

    def _bind(self, prompts: list[Any], logged: list[Rollout], trained: list[Rollout]) -> None:
        """Make what TRL holds by row agree with the selection."""
        # TRL renders the prompts again only where there are images; everywhere else they are only logged.
        images = any(rollout.images for rollout in trained)
        prompts[:] = [rollout.prompt for rollout in (trained if images else logged)]
        self._logged_prompts = [rollout.prompt for rollout in logged] if images else None
        if self.environment_factories is not None:
            names = [rollout.row.get("environment") if self._multi_environment else None for rollout in trained]
            self._batch_environments = names
        self._pending_extra_logs.clear()
        for column in {column for rollout in logged for column in rollout.extra_logs}:
            self._pending_extra_logs[column] = [rollout.extra_logs.get(column) for rollout in logged]

    def _generate_in_chunks(self, generate: Callable[..., Generation], prompts: list[Any]) -> Generation:
        """TRL's generation; where rewards are computed ahead, in chunks whose whole groups are scored meanwhile."""
        training, rows = self.model.training, self._rows
        size = self.num_generations if training else self.num_generations_eval
        # A group that spans processes is scored by TRL's own call, after generation
        if self._ahead is None or rows is None or len(prompts) % size:
            return generate(prompts)
        groups = len(prompts) // size
        count = min(self.args.generation_chunks, groups)
        cuts = [groups * i // count * size for i in range(count + 1)]
        chunks = []
        for start, stop in pairwise(cuts):
            chunks.append(generate(prompts[start:stop]))
            self._score_ahead(start, rows[start:stop], prompts[start:stop], chunks[-1])
        if count == 1:
            return chunks[0]
        processes = self.accelerator.num_processes
        sizes = [(stop - start) * processes for start, stop in pairwise(cuts)]
        pool_rounds(self._metrics["train" if training else "eval"], sizes)
        return joined_generation(chunks)

    def _score_ahead(self, start: int, rows: Rows, prompts: list[Any], generation: Generation) -> None:
        assert self._ahead is not None
        rollouts = rollouts_of(rows, prompts, generation)
        # What TRL's `_calculate_rewards` passes to a function
        columns = {
            key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion", "completion_ids")
        }
        if self.environments is not None:
            columns["environments"] = self.environments[start : start + len(rows)]
        self._ahead.submit(
            {
                "prompts": prompts,
                "completions": [rollout.completion for rollout in rollouts],
                "completion_ids": [rollout.completion_ids for rollout in rollouts],
                **columns,
                "trainer_state": self.state,
                "log_extra": self._log_completion_extra,
                "log_metric": self._log_metric,
            },
            self.num_generations if self.model.training else self.num_generations_eval,
        )

    def _take_rewards_ahead(self) -> None:
        """Hand TRL the rewards that are there, in the order of the batch, and tell what failed."""
        if self._ahead is None:
            return
        rewards = self._ahead.collect()
        if not self._guards or not rewards[0]:
            return
        for func, ready in zip(self._guards, rewards, strict=True):
            func.ready = ready
        for fault in self._ahead.faults:
            logger.warning(f"{fault.message}\nIts group has no reward from it.", main_process_only=False)
        counts = torch.zeros(len(self._guards), device=self.accelerator.device)
        names = [func.__name__ for func in self._guards]
        for fault in self._ahead.faults:
            counts[names.index(fault.name)] += 1
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, count in zip(names, self.accelerator.reduce(counts, reduction="sum").tolist(), strict=True):
            failed = metrics[f"rewards/{name}/failed_groups"]
            if self._rounds:  # refilling: all rounds of a batch count together
                failed[-1] += count
            else:
                failed.append(count)

    def _score(self, prompts: list[Any], generation: Generation) -> ScoredRound:
        rows = self._rows
        assert rows is not None
        rollouts = rollouts_of(rows, prompts, generation)
        rewards = self._calculate_rewards(
            rows,
            prompts,
            [rollout.completion for rollout in rollouts],
            [rollout.completion_ids for rollout in rollouts],
        )
        for column, values in self._pending_extra_logs.items():
            for rollout, value in zip(rollouts, values, strict=False):
                rollout.extra_logs[column] = value
        self._pending_extra_logs.clear()
        for rollout, steps in zip(rollouts, self._step_rewards, strict=True):
            rollout.step_rewards = steps
        return ScoredRound(rollouts, rewards)

    def score_round(self, rows: Rows) -> ScoredRound:
        """
        Generate for `rows` (this rank's, each standing for one completion) and score, without tensors or log-probs.
        """
        outer, self._rows = self._rows, rows
        self._round_only = True
        try:
            super()._generate_and_score_completions(rows)
        except _RoundScored as done:
            return done.scored
        finally:
            self._round_only, self._rows = False, outer
        raise AssertionError("TRL no longer calls `_generate` from `_generate_and_score_completions`")

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._selection is not None:  # TRL asks again for what was scored to select
            assert self._base_rewards is not None
            return self._base_rewards
        self._take_rewards_ahead()
        rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        self._raise_reward_faults(rewards)
        guarded = {i: func for i, func in enumerate(self.reward_funcs) if isinstance(func, RewardGuard)}
        self._step_rewards = [
            {column: value for column, value in zip(guarded, values, strict=True) if is_by_step(value)}
            for values in zip(*(func.returned for func in guarded.values()), strict=True)
        ] or [{} for _ in kwargs.get("prompts") or args[1]]
        if not self._round_only:
            self._base_rewards = rewards
        return rewards

    def _raise_reward_faults(self, rewards: torch.Tensor) -> None:
        """Every rank sees the same gathered rewards, so all of them raise or none does."""
        from_model = torch.tensor([isinstance(func, nn.Module) for func in self.reward_funcs], device=rewards.device)
        bad = (rewards == FAILED) | (~rewards.isfinite() & from_model)
        if not bad.any():
            return
        for column in bad.any(dim=0).nonzero().flatten().tolist():
            func, name = self.reward_funcs[column], self.reward_func_names[column]
            faults = [func.fault] if isinstance(func, RewardGuard) and func.fault else []
            row = int(bad[:, column].nonzero()[0])
            where = f"completion {row} of {len(rewards)} (counted over all processes)"
            told = [*gather_object(faults), f"The reward model `{name}` returned NaN or infinity for {where}."]
            raise RewardFunctionError(told[0])

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        training = self.model.training  # before generation, which may leave the model in another mode
        try:
            self._rows = inputs = self.rows_to_generate(inputs) if training else inputs
            self._credits_late = training and self.may_credit_late and not self._deals_apart
            length = self.completion_length() if training else None
            with self._asking_for_passes(self), self._limiting_completions(length):
                output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            self._credit(output, training)
            if self._logged_prompts is not None:
                self._relog("prompt", gather_object(self._logged_prompts))
            if len(self._rounds) > 1:
                self._restate_metrics()
            if training:
                self.on_rollouts(output, self._selection, self._rounds)
            return output
        except Exception as error:
            # Reward faults reach every rank; anything else may be one rank's alone, and saving takes all of them.
            if isinstance(error, RewardFunctionError) or self.accelerator.num_processes == 1:
                self.save_before_stopping(error)
            raise
        finally:
            self._rows, self._rounds, self._selection, self._base_rewards = None, [], None, None
            self._extras, self._step_rewards, self._credits_late = (), [], False
            self._logged_prompts = None
            if self._ahead is not None:  # nothing is left of a batch that failed
                self._ahead.discard()
                for func in self._guards:
                    func.ready = None

    def _restate_metrics(self) -> None:
        """TRL's metrics over everything that was generated, not over its last round or what was selected."""
        metrics = self.train_metrics
        pool_rounds(metrics, [len(scored.rewards) for scored in self._rounds])
        rewards = torch.cat([scored.rewards for scored in self._rounds])
        stats = reward_statistics(rewards, self.reward_weights, self.reward_func_names, self.num_generations)
        if self.scale_rewards == "batch" or self.multi_objective_aggregation == "normalize_then_sum":
            del stats["frac_reward_zero_std"]  # there TRL asks for the deviation of the batch it trains on
        for key, value in stats.items():
            metrics[key][-1] = value

    def _credit(self, output: dict[str, Any], training: bool) -> None:
        """Put advantages of ours into TRL's output, and give copies those of their source."""
        rewards = self._base_rewards
        assert rewards is not None
        advantages = self.estimate_advantages(rewards, training)
        copied = self._selection is not None and self._selection.sources != list(range(len(self._selection.slots)))
        per_rank = len(output["advantages"])
        start = self.accelerator.process_index * per_rank
        here = slice(start, start + per_rank)
        if advantages is not None:
            self._relog("advantages", advantages.tolist())
        elif copied:
            # Computed by TRL on the batch without copies: a copy has the advantage of its source
            advantages = self.accelerator.gather(output["advantages"])
        if copied and self._selection is not None:
            source = torch.tensor(self._selection.rows(self._selection.sources), device=rewards.device)
            rewards = rewards[source]
            advantages = advantages[source] if advantages is not None else None
            output[SOURCE_ROW] = source[here]
        if advantages is not None:
            output["advantages"] = advantages[here]
        self.credit_tokens(output, rewards[here], training)

    def _relog(self, column: str, values: list[Any]) -> None:
        """Replace the last entries of a column of the completions table."""
        log = self._logs[column]
        earlier = list(log)[: -len(values)]
        log.clear()
        log.extend(earlier + values)

    # Loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training and self._window[0] != self.state.global_step:
            self._window = (self.state.global_step, self._step)
            self._before_window = {
                "random": random_states(),
                "run": copy.deepcopy(self.run_state()),
                "process": self.process_state(),
                "metrics": self._copied_metrics(),
                "num_input_tokens_seen": self.state.num_input_tokens_seen,
            }
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not before:
            self.on_new_buffer(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        """Called when TRL has dealt a generation batch into micro-batches; they may be changed in place."""

    def windows_of_buffer(self) -> list[tuple[int, int]]:
        """Stretches of a new buffer's micro-batches that always share an optimizer step; see [`windows`]."""
        accumulation = self.args.gradient_accumulation_steps
        until_update = self.current_gradient_accumulation_steps - (self._step - self._window[1])
        return windows(self.args.steps_per_generation, self._step, until_update, accumulation, self.num_iterations)

    def pass_without_loss(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Log-probabilities of a whole generation batch: `forward` is TRL's pass."""
        return forward(*args, **kwargs)

    def with_extras(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, TRL's pass, with further tensors after the three that it returns."""
        return forward

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.with_extras(super()._get_per_token_logps_and_entropies)
        if self._loss_inputs is None:
            result = self.pass_without_loss(forward, *args, **kwargs)
            self._extras = self._extras or result[3:]  # the policy comes first, then the reference
            return result[:3]
        # The forward of the loss: TRL reads the old log-probabilities from its inputs after it
        result = forward(*args, **kwargs)
        inputs, logps = self._loss_inputs, result[0]
        self._loss_pass = result
        self.credit_late(self._dealt_inputs, logps.detach(), result[3:])
        inputs.update(self._dealt_inputs)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        replaced = self.old_logps_for_loss(logps, inputs, mask)
        if replaced is not None:
            inputs["old_per_token_logps"] = replaced
        return result[:3]

    def restate_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss on a micro-batch, as TRL's own micro-batches would have it; restates metrics too."""
        return loss

    def added_loss(self, loss: torch.Tensor, model: Any, inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Any:
        """The loss with terms of ours; `outputs` are those of the pass with its extras."""
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._loss_inputs, self._dealt_inputs = dict(inputs), inputs
        try:
            loss: torch.Tensor = super()._compute_loss(model, self._loss_inputs)
            outputs, self._loss_pass = self._loss_pass, ()
        finally:
            self._loss_inputs, self._dealt_inputs = None, {}
        return self.added_loss(self.restate_loss(loss, inputs), model, inputs, outputs)

    # Data and metrics

    def rows_seen_in_training(self) -> Any:
        """The training set with the columns that the training loop deals."""
        dataset: Any = self.train_dataset
        return self._remove_unused_columns(dataset, description="refill")

    @property
    def train_metrics(self) -> dict[str, list[float]]:
        """What TRL averages into its next log of training."""
        return self._metrics["train"]

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        return EpochSampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    # Checkpoints

    @property
    def _finished_micro_steps(self) -> int:
        """Micro-batches of finished optimizer steps; TRL's `_step` runs ahead of it inside a step."""
        global_step, start = self._window
        return start if global_step == self.state.global_step else self._step

    def _buffer_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"trl_ext_buffer_{self.accelerator.process_index}.pt")

    def _process_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"trl_ext_process_{self.accelerator.process_index}.pt")

    @property
    def _layout(self) -> dict[str, int]:
        """What a half-used generation batch depends on."""
        names = ("steps_per_generation", "per_device_train_batch_size", "gradient_accumulation_steps")
        layout = {name: getattr(self.args, name) for name in names}
        return layout | {"num_iterations": self.num_iterations, "num_processes": self.accelerator.num_processes}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Ours first: when TRL's files are complete, so is the checkpoint
        if not self.args.save_only_model:
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            directory = os.path.join(self._get_output_dir(trial=trial), checkpoint)
            os.makedirs(directory, exist_ok=True)
            step = self._finished_micro_steps
            state = {"layout": self._layout, "step": step, "metrics": self._copied_metrics(), "run": self.run_state()}
            if self.args.should_save:
                torch.save(state, os.path.join(directory, RUN_STATE_FILE))
            own = self.process_state()
            if own:
                torch.save(own, self._process_file(directory))
            # Between two generations, the rest of a generation batch is still to be trained on
            if step % (self.args.steps_per_generation * self.num_iterations):
                torch.save(self._buffered_inputs, self._buffer_file(directory))
        super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not os.path.exists(os.path.join(checkpoint, RUN_STATE_FILE)):
            return
        state = saved_state(checkpoint)
        self.load_run_state(state["run"])
        if os.path.exists(self._process_file(checkpoint)):
            self.load_process_state(torch.load(self._process_file(checkpoint), map_location="cpu", weights_only=False))
        self._metrics["train"].update(state["metrics"])
        if state["layout"] != self._layout:
            logger.warning(
                f"The checkpoint was written with {state['layout']}, this run has {self._layout}. The generation "
                "batch that was in use doesn't fit and is generated anew; the rest of the run goes on as it was."
            )
            return
        self._step = state["step"]
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            buffer = torch.load(self._buffer_file(checkpoint), map_location="cpu", weights_only=False)
            self._buffered_inputs = send_to_device(buffer, self.accelerator.device)

    def save_before_stopping(self, error: Exception) -> None:
        """Write a checkpoint of the last finished optimizer step before an error ends the process."""
        step = self.state.global_step
        if step == 0 or self.optimizer is None:
            return
        if self._saved_step != step:
            if self._window[0] == step:
                # What the failed generation drew is undone, so that a resumed run draws it again
                set_random_states(self._before_window["random"])
                self.load_run_state(self._before_window["run"])
                self.load_process_state(self._before_window["process"])
                self._metrics["train"] = defaultdict(list, self._before_window["metrics"])
                self.state.num_input_tokens_seen = self._before_window["num_input_tokens_seen"]
            self._save_checkpoint(self.model, trial=None)
        saved = f"{self.args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{step}"
        go_on = (
            "" if self.args.save_only_model else " Go on with `resume_from_checkpoint=True` once the cause is mended."
        )
        error.add_note(f"What was trained until then is saved in {saved}.{go_on}")

    def _copied_metrics(self) -> dict[str, list[float]]:
        return {key: list(values) for key, values in self.train_metrics.items()}

    # Rollouts without training

    def deal_apart(self) -> list[dict[str, Any]]:
        """The micro-batches that TRL would deal for the first generation batch of an epoch. Leaves no trace."""
        kept = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs")
        before = {name: copy.deepcopy(getattr(self, name)) for name in kept}
        kept_as_is = ("_step", "_buffered_inputs", "_window", "_before_window", "on_new_buffer")
        before |= {name: getattr(self, name) for name in kept_as_is}
        states, run, tokens = random_states(), copy.deepcopy(self.run_state()), self.state.num_input_tokens_seen
        dealt: list[dict[str, Any]] = []
        self._step, self._buffered_inputs, self._deals_apart = 0, None, True
        self.on_new_buffer = dealt.extend  # type: ignore[assignment, method-assign]
        try:
            self._prepare_inputs(next(iter(self.get_train_dataloader())))
        finally:
            del self.on_new_buffer
            self._deals_apart = False
            before.pop("on_new_buffer")
            for name, value in before.items():
                setattr(self, name, value)
            set_random_states(states)
            self.load_run_state(run)
            self.state.num_input_tokens_seen = tokens
        return dealt

    @contextmanager
    def _apart_from_training(self, num_generations: int, seed: int | None) -> Iterator[None]:
        """Evaluation mode that leaves no trace in random states, metrics and logs."""
        training, generations = self.model.training, self.num_generations_eval
        metrics, pending = self._metrics["eval"], copy.deepcopy(self._pending_metrics)
        self._metrics["eval"] = copy.deepcopy(metrics)
        self.model.eval()
        self.num_generations_eval = num_generations
        states = random_states()
        try:
            if seed is not None:
                torch.manual_seed(seed + self.accelerator.process_index)
            yield
        finally:
            set_random_states(states)
            self.model.train(training)
            self.num_generations_eval = generations
            self._metrics["eval"], self._pending_metrics = metrics, pending
