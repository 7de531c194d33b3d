"""
`trl.GRPOTrainer` with its private methods wrapped, never copied: what a method of ours needs of them, under names of
ours. `tests/upstream/` records the source of everything that is wrapped or leaned on here.

One generation batch in training, and the optimizer steps on it, in the order of time. Names of TRL's methods start
with an underscore; the hooks are ours.

    _prepare_inputs                       once for each micro-batch; TRL generates when a batch is due
      _generate_and_score_completions     `self.batch` begins: a GenerationBatch
        rows_to_generate                  sees the dealt rows; observers and the prompt chooser decide
        completion_length                 how long completions may be
        _generate                         completions as lists of ids
          _calculate_rewards              where groups are selected: scored at once, on raw rollouts
          select_groups                   sees batch.rounds; score_round generates and scores further rounds
        _get_per_token_logps_and_entropies   old policy, then reference
          pass_without_loss, with_extras  how the batch goes through them; what is read beside log-probabilities
        _calculate_rewards                TRL asks again and gets what is there
        estimate_advantages               sees rewards (N, F) of all ranks
        credit_tokens                     sees TRL's tensors of the batch: advantages by token
        on_rollouts                       observers and metrics; then the batch is dropped
      on_new_buffer                       sees TRL's micro-batches, before their first use
    _compute_loss                         once for each micro-batch
      _get_per_token_logps_and_entropies
        credit_late                       the first pass of a batch that waited for it
        old_logps_for_loss                what TRL's ratio is taken against
      restate_loss                        TRL's loss and metrics, as TRL's own micro-batches would have them
      added_loss                          sees TRL's loss and the outputs of the pass

Selection happens inside `_generate` because TRL binds environments and tools to rows, prepares images and prompts,
generates, *and then* computes log-probabilities and asks for rewards. Completions are therefore scored as soon as
`_generate` has them, further rounds start from inside it, and TRL continues as if it had generated what was selected.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn

from ...rewards.ahead import RewardsAhead
from ...rewards.guard import RewardFunctionError, RewardGuard, guard, raise_reward_faults
from ...rewards.steps import is_by_step
from ...rollouts.exchange import RolloutExchange
from ...rollouts.generation_batch import GenerationBatch, Rows
from ...rollouts.micro_batches import SOURCE_ROW
from ...rollouts.packing import step_slices
from ...rollouts.prompts import TokenizedPrompt
from ...rollouts.rollout import Generation, Rollout, ScoredRound, generation_of, joined_generation, rollouts_of
from ...rollouts.selection import GroupSelection
from ...rollouts.statistics import pool_rounds, restate_rounds
from .checkpoints import CheckpointSeams


logger = get_logger(__name__)


class _RoundScored(Exception):
    """Leaves TRL's method once the completions are scored: rows nobody trains on cost no forward pass."""

    def __init__(self, scored: ScoredRound) -> None:
        self.scored = scored


class GRPOSeams(CheckpointSeams):
    """Hooks for [`GRPOTrainer`], all of them neutral here. The time line above says when each is called."""

    # Whether rollouts are selected in training
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
    reward_funcs: list[Any]
    _logs: dict[str, Any]
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batch = GenerationBatch()  # empty between two batches
        self._loss_inputs: dict[str, Any] | None = None
        self._dealt_inputs: dict[str, Any] = {}  # those of the loss, as the buffer has them
        self._loss_pass: tuple[Any, ...] = ()
        self.previewed: list[dict[str, Any]] | None = None  # see `seams.probes.preview_micro_batches`
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
            holder.num_iterations = 1 if self.batch.credits_late else self.args.gradient_accumulation_steps + 1
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

    def completion_length(self) -> int:
        """Tokens that a completion of this generation batch may have in training."""
        return self.max_completion_length

    def select_groups(self) -> GroupSelection:
        """Decide on `self.batch.rounds`, which holds one round. [`score_round`] generates more."""
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
        function rewarded are in `self.batch.step_rewards`.
        """

    def credit_late(
        self, inputs: dict[str, Any], per_token_logps: torch.Tensor, extras: tuple[torch.Tensor, ...]
    ) -> None:
        """Change a micro-batch that `credit_tokens` has left for its first pass."""

    def on_rollouts(self, output: dict[str, Any], batch: GenerationBatch) -> None:
        """Called with TRL's tensors of each generation batch in training, and what it was made of."""

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        """Called when TRL has dealt a generation batch into micro-batches; they may be changed in place."""

    def pass_without_loss(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Log-probabilities of a whole generation batch: `forward` is TRL's pass."""
        return forward(*args, **kwargs)

    def with_extras(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, TRL's pass, with further tensors after the three that it returns."""
        return forward

    def restate_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss on a micro-batch, as TRL's own micro-batches would have it; restates metrics too."""
        return loss

    def added_loss(self, loss: torch.Tensor, model: Any, inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Any:
        """The loss with terms of ours; `outputs` are those of the pass with its extras."""
        return loss

    # Generation and selection

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if all(isinstance(prompt, TokenizedPrompt) for prompt in prompts):
            return [prompt.input_ids for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate(self, prompts: list[Any]) -> Generation:
        batch = self.batch
        generation = self._generate_in_chunks(super()._generate, prompts)
        if not (batch.round_only or (self.selects and self.model.training)):
            return generation
        scored = self._score(prompts, generation)
        if batch.round_only:
            raise _RoundScored(scored)
        batch.rounds = [scored]
        batch.selection = selection = self.select_groups()
        exchange = RolloutExchange(batch.rounds, self.accelerator.process_index, self.accelerator.num_processes)
        base = selection.rows(list(range(len(selection.slots))))
        size = selection.num_generations
        keys = [(ref.round, ref.group * size + i) for ref in selection.slots for i in range(size)]
        trained_rows = selection.rows(selection.sources)
        logged = exchange.fetch(keys)
        # Where nothing is copied both are the same rows, and nothing more has to travel
        trained = logged if trained_rows == base else exchange.fetch([keys[row] for row in trained_rows])
        starts = [0, *accumulate(len(scored.rewards) for scored in batch.rounds)]
        rewards = torch.cat([scored.rewards for scored in batch.rounds])
        batch.rewards = rewards[[starts[round_] + row for round_, row in keys]]
        batch.step_rewards = [rollout.step_rewards for rollout in trained]
        self._bind(prompts, logged, trained)
        return generation_of(logged, trained)

    def _bind(self, prompts: list[Any], logged: list[Rollout], trained: list[Rollout]) -> None:
        """Make what TRL holds by row agree with the selection."""
        # TRL renders the prompts again only where there are images; everywhere else they are only logged.
        images = any(rollout.images for rollout in trained)
        prompts[:] = [rollout.prompt for rollout in (trained if images else logged)]
        self.batch.logged_prompts = [rollout.prompt for rollout in logged] if images else None
        if self.environment_factories is not None:
            names = [rollout.row.get("environment") if self._multi_environment else None for rollout in trained]
            self._batch_environments = names
        self._pending_extra_logs.clear()
        for column in {column for rollout in logged for column in rollout.extra_logs}:
            self._pending_extra_logs[column] = [rollout.extra_logs.get(column) for rollout in logged]

    def _generate_in_chunks(self, generate: Callable[..., Generation], prompts: list[Any]) -> Generation:
        """TRL's generation; where rewards are computed ahead, in chunks whose whole groups are scored meanwhile."""
        training, rows = self.model.training, self.batch.rows
        size = self.num_generations if training else self.num_generations_eval
        if self._ahead is None or len(prompts) % size:  # TRL's own call scores a group that spans processes
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
        """Hand TRL the rewards that are there, in the order of the batch, and report what failed."""
        if self._ahead is None:
            return
        rewards = self._ahead.collect()
        if not self._guards or not rewards[0]:
            return
        for func, ready in zip(self._guards, rewards, strict=True):
            func.ready = ready
        for fault in self._ahead.faults:
            logger.warning(f"{fault.message}\nIts group has no reward from it.", main_process_only=False)
        counts = torch.tensor(self._ahead.faults_by_function(), device=self.accelerator.device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        metrics = self._metrics["train" if self.model.training else "eval"]
        for func, count in zip(self._guards, counts.tolist(), strict=True):
            failed = metrics[f"rewards/{func.__name__}/failed_groups"]
            # All rounds of a batch count together
            failed.append((failed.pop() if self.batch.further else 0.0) + count)

    def _score(self, prompts: list[Any], generation: Generation) -> ScoredRound:
        rows = self.batch.rows
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
        for rollout, steps in zip(rollouts, self.batch.step_rewards, strict=True):
            rollout.step_rewards = steps
        return ScoredRound(rollouts, rewards)

    def score_round(self, rows: Rows) -> ScoredRound:
        """
        Generate for `rows` (this rank's, each standing for one completion) and score, without tensors or log-probs.
        """
        outer = self.batch
        self.batch = GenerationBatch(rows, round_only=True, further=bool(outer.rounds))
        try:
            super()._generate_and_score_completions(rows)
        except _RoundScored as done:
            return done.scored
        finally:
            self.batch = outer
        raise AssertionError("TRL no longer calls `_generate` from `_generate_and_score_completions`")

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = self.batch
        if batch.selection is not None:  # TRL asks again for what was scored to select
            assert batch.rewards is not None
            return batch.rewards
        self._take_rewards_ahead()
        rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        raise_reward_faults(rewards, self.reward_funcs, self.reward_func_names)
        guarded = {i: func for i, func in enumerate(self.reward_funcs) if isinstance(func, RewardGuard)}
        batch.step_rewards = [
            {column: value for column, value in zip(guarded, values, strict=True) if is_by_step(value)}
            for values in zip(*(func.returned for func in guarded.values()), strict=True)
        ] or [{} for _ in kwargs.get("prompts") or args[1]]
        batch.rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        training = self.model.training  # before generation, which may leave the model in another mode
        self.batch = batch = GenerationBatch(training=training)
        try:
            batch.rows = self.rows_to_generate(inputs) if training else inputs
            batch.credits_late = training and self.may_credit_late and self.previewed is None
            length = self.completion_length() if training else None
            with self._asking_for_passes(self), self._limiting_completions(length):
                output: dict[str, Any] = super()._generate_and_score_completions(batch.rows)
            self._credit(output)
            if batch.logged_prompts is not None:
                self._relog("prompt", gather_object(batch.logged_prompts))
            if len(batch.rounds) > 1:
                # There TRL asks for the deviation of the batch that it trains on
                by_batch = self.scale_rewards == "batch" or self.multi_objective_aggregation == "normalize_then_sum"
                named = self.reward_weights, self.reward_func_names, self.num_generations
                restate_rounds(self.train_metrics, batch.rounds, *named, zero_std=not by_batch)
            if training:
                self.on_rollouts(output, batch)
            return output
        except Exception as error:
            # Reward faults reach every rank; anything else may be one rank's alone, and saving takes all of them.
            if isinstance(error, RewardFunctionError) or self.accelerator.num_processes == 1:
                self.save_before_stopping(error)
            raise
        finally:
            self.batch = GenerationBatch()
            if self._ahead is not None:  # nothing is left of a batch that failed
                self._ahead.discard()
                for func in self._guards:
                    func.ready = None

    def _credit(self, output: dict[str, Any]) -> None:
        """Put advantages of ours into TRL's output, and give copies those of their source."""
        rewards, selection, training = self.batch.rewards, self.batch.selection, self.batch.training
        assert rewards is not None
        advantages = self.estimate_advantages(rewards, training)
        copied = selection is not None and selection.sources != list(range(len(selection.slots)))
        per_rank = len(output["advantages"])
        start = self.accelerator.process_index * per_rank
        here = slice(start, start + per_rank)
        if advantages is not None:
            self._relog("advantages", advantages.tolist())
        elif copied:
            # Computed by TRL on the batch without copies: a copy has the advantage of its source
            advantages = self.accelerator.gather(output["advantages"])
        if copied and selection is not None:
            source = torch.tensor(selection.rows(selection.sources), device=rewards.device)
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

    # Micro-batches and loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training:
            self.begin_window()
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not before:
            if self.previewed is not None:
                self.previewed.extend(self._buffered_inputs)
                return inputs
            self.on_new_buffer(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def buffer_step_slices(self) -> list[tuple[int, int]]:
        """Stretches of a new buffer's micro-batches that always share an optimizer step; see [`step_slices`]."""
        accumulation = self.args.gradient_accumulation_steps
        until_update = self.current_gradient_accumulation_steps - (self._step - self._window[1])
        return step_slices(self.args.steps_per_generation, self._step, until_update, accumulation, self.num_iterations)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.with_extras(super()._get_per_token_logps_and_entropies)
        if self._loss_inputs is None:
            result = self.pass_without_loss(forward, *args, **kwargs)
            self.batch.extras = self.batch.extras or result[3:]  # the policy comes first, then the reference
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

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._loss_inputs, self._dealt_inputs = dict(inputs), inputs
        try:
            loss: torch.Tensor = super()._compute_loss(model, self._loss_inputs)
            outputs, self._loss_pass = self._loss_pass, ()
        finally:
            self._loss_inputs, self._dealt_inputs = None, {}
        return self.added_loss(self.restate_loss(loss, inputs), model, inputs, outputs)

    def rows_seen_in_training(self) -> Any:
        """The training set with the columns that the training loop deals."""
        dataset: Any = self.train_dataset
        return self._remove_unused_columns(dataset, description="refill")
