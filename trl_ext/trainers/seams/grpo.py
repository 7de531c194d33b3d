"""
Wraps the private methods of `trl.GRPOTrainer`, and never copies them. Methods of `trl_ext` use the hooks of
[`GRPOSeams`] instead. `tests/upstream/` records the source of everything that is wrapped or relied on here.

This is what happens to one generation batch in training, in the order of time. Names of TRL's methods start with an
underscore, the others are hooks. A line is called from within the line above it that is less indented.

    _prepare_inputs                       for each micro-batch
      begin_window                        keeps the state of the run if an optimizer step begins (checkpoints.py)
      _generate_and_score_completions     when TRL needs a new generation batch; creates `self.batch`
        rows_to_generate                  gets the dealt data set rows; observers begin, and prompts are chosen
        check_rows                        refuses rows without a prompt that TRL can read
        completion_length                 limits the length of completions
        _generate                         generates completions, as lists of ids
          _tokenize_prompts               skips prompts that are given as token ids
          _calculate_rewards              if groups are selected: scores them at once, as raw rollouts
          select_groups                   sees `batch.rounds`; score_round generates and scores further rounds
        _get_per_token_logps_and_entropies   of the old policy and of the reference, if they are needed
          with_extras                     tensors to read besides log-probabilities
          pass_without_loss               how the batch goes through the model
        _calculate_rewards                scores the batch; if groups were selected, returns their rewards
        estimate_advantages               gets the rewards (N, F) of all ranks, and TRL's tensors of the batch
        credit_tokens                     gets TRL's tensors of the batch; advantages of tokens
        on_rollouts                       observers and metrics; then `self.batch` is dropped
      on_new_buffer                       gets TRL's micro-batches before their first use
    _compute_loss                         for each micro-batch
      _get_per_token_logps_and_entropies
        with_extras                       as above
        credit_late                       advantages of tokens, if the pass of the loss stands for the old policy's
        advantages_for_loss               advantages of tokens, once it is known how far the policy has moved
        old_logps_for_loss                what TRL's importance ratio is taken against
      restate_loss                        TRL's loss and metrics, as TRL's own micro-batches would have them
      added_loss                          gets TRL's loss and the tensors of the pass; adds terms

In evaluation the same happens without `begin_window`, `rows_to_generate`, `completion_length`, selection,
`on_rollouts` and `on_new_buffer`.

Groups are selected inside `_generate`, because TRL's `_generate_and_score_completions` binds environments and tools to
rows, prepares images and prompts, generates, and only then computes log-probabilities and asks for rewards. So
completions are scored as soon as `_generate` has them, further rounds are generated from there, and TRL continues as
if it had generated the selected groups.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from ...rewards.guard import RewardFunctionError, RewardGuard, guard, raise_reward_faults
from ...rewards.steps import is_by_step
from ...roles.reward_adapter import without_reward_adapters
from ...rollouts.exchange import RolloutExchange
from ...rollouts.generation_batch import GenerationBatch, Rows
from ...rollouts.micro_batches import SOURCE_ROW
from ...rollouts.packing import step_slices
from ...rollouts.prompts import TokenizedPrompt
from ...rollouts.rollout import Generation, Rollout, ScoredRound, generation_of, rollouts_of
from ...rollouts.selection import GroupSelection
from ...rollouts.shared_pass import Sharing
from ...rollouts.statistics import pool_evaluation, restate_rounds, token_weights
from ..engine_checks import sent_rank
from ..sampling import end_completions_at, further_ends, sampling_as_told
from .checkpoints import CheckpointSeams
from .engine import awake, send_adapter_alone, taking_adapters
from .evaluation import EvaluatedBatch, completions_apart, table_of_evaluation
from .fused_head import gather_head_with_model
from .out_of_memory import MemoryFallback, in_parts
from .prefixes import sharing_prefixes
from .references import making_reference, reference_of, use_reference
from .reward_adapters import attach_reward_adapters
from .rewards_ahead import discard_rewards, generate_in_chunks, hand_rewards_to_trl, rewards_ahead_of
from .waiting import RewardWatch


class _RoundScored(Exception):
    """Leaves TRL's method when completions are scored: rows that are not trained on need no forward pass."""

    def __init__(self, scored: ScoredRound) -> None:
        self.scored = scored


class GRPOSeams(CheckpointSeams):
    """The hooks for [`GRPOTrainer`]. They change nothing here. The time line above says when each is called."""

    # Whether groups are selected in training, and whether that may generate further rounds
    selects = False
    draws_rounds = False
    # Whether every generation batch goes through the reference, and through the policy before its first update. TRL
    # makes these passes only if its own loss needs them.
    needs_reference = False
    needs_old_pass = False
    # A reference of the user's, for trainers that take one
    given_reference: Any = None
    # Whether a critic learns from every row
    has_value_loss = False
    # Whether the first pass of the loss over a generation batch may stand for the old policy's pass
    may_credit_late = False

    # TRL's annotations allow None, but once a trainer exists these are set
    reward_funcs: list[Any]
    _logs: dict[str, Any]
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batch = GenerationBatch()  # empty between two batches
        self._loss_inputs: dict[str, Any] | None = None  # what TRL's loss reads; `None` outside of the loss
        self._buffer_inputs: dict[str, Any] = {}  # the micro-batch in TRL's buffer of which these are a copy
        self._loss_pass: tuple[Any, ...] = ()  # tensors of the loss's pass
        self.previewed: list[dict[str, Any]] | None = None  # see `seams.probes.preview_micro_batches`
        self._evaluated: tuple[torch.Tensor, float] | None = None  # rewards and loss tokens of a batch of evaluation
        self._evaluated_as: str | None = None  # prefix of the evaluation that is under way
        self.sharing: Sharing | None = None  # what passes share; `None`: they are TRL's
        self.memory_fallback = MemoryFallback(self)
        config = kwargs["args"]
        wanted = self.needs_reference or config.beta != 0.0
        self._own_reference = own = reference_of(kwargs, self.given_reference) if wanted else None
        rank = sent_rank(config, kwargs)
        with making_reference(self, kwargs, own, wanted), self._asking_for_passes(config), taking_adapters(rank):
            super().__init__(*args, **kwargs)
        gather_head_with_model(self.accelerator.unwrap_model(self.model))
        if rank is not None:
            send_adapter_alone(self)
        if own is not None:
            use_reference(self, own)
        self._own_reference = self.given_reference = None  # it is held elsewhere now
        self.beta = self.args.beta
        if ends := further_ends(self.args):
            end_completions_at(self, [*self.eos_token_ids, *ends])
        attach_reward_adapters(self)
        # Now that TRL has named the functions and added those of environments
        self.reward_funcs = [
            func if isinstance(func, nn.Module) else guard(func, name)
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self.reward_guards = [func for func in self.reward_funcs if isinstance(func, RewardGuard)]
        self.rewards_ahead = rewards_ahead_of(self)
        self.reward_watch = RewardWatch(self)

    @contextmanager
    def _asking_for_passes(self, holder: Any) -> Iterator[None]:
        """
        Makes TRL load a reference and make the passes that are needed here. TRL decides by the attributes of `holder`:
        the arguments while it is constructed, and the trainer itself afterwards.
        """
        before = holder.beta, holder.num_iterations
        if self.needs_reference:
            holder.beta = holder.beta or 1.0  # any number but zero; it is restored before a loss is computed
        if self._own_reference is not None:
            holder.beta = 0.0  # TRL would load one; this is while the trainer is constructed
        if self.needs_old_pass and holder is self:
            # TRL leaves the pass out if gradient_accumulation_steps % (steps_per_generation * num_iterations) == 0
            holder.num_iterations = 1 if self.batch.credits_late else self.args.gradient_accumulation_steps + 1
        try:
            yield
        finally:
            holder.beta, holder.num_iterations = before

    @contextmanager
    def _limiting_completions(self, length: int | None) -> Iterator[None]:
        """Limits completions to `length` tokens. TRL's losses and rewards still see `max_completion_length`."""
        # How TRL generates decides which of the two it has
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
        """The data set rows of this rank's generation batch in training. `rows` are those that the loader dealt."""
        return rows

    def check_rows(self, rows: Rows) -> None:
        """Raises an error for data set rows that nothing can be generated for. Every row passes before it is used."""

    def completion_length(self) -> int:
        """Longest completion of this generation batch in training, in tokens."""
        return self.max_completion_length

    def select_groups(self) -> GroupSelection:
        """Select groups from `self.batch.rounds`, which has one round. [`score_round`] generates further ones."""
        raise NotImplementedError

    def judged(self, rewards: torch.Tensor) -> torch.Tensor:
        """The rewards `(N, F)` of all ranks as they count, from those that the functions returned."""
        return rewards

    def estimate_advantages(
        self, rewards: torch.Tensor, output: dict[str, Any], training: bool
    ) -> torch.Tensor | None:
        """
        Advantages `(N,)` from the rewards `(N, F)` of all ranks, NaN where there is none. `output` are TRL's tensors
        of this rank's rows. `None`: TRL's advantages are used.
        """
        return None

    def old_logps_for_loss(
        self, per_token_logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor
    ) -> torch.Tensor | None:
        """Old log-probabilities `(B, T)` for TRL's loss. `None`: those in `inputs` are used."""
        return None

    def advantages_for_loss(
        self, per_token_logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor
    ) -> torch.Tensor | None:
        """Advantages `(B, T)` for TRL's loss. `None`: those in `inputs` are used."""
        return None

    def credit_tokens(self, output: dict[str, Any], rewards: torch.Tensor, training: bool) -> None:
        """
        Change TRL's tensors of a generation batch, `output`, in place. `rewards` `(n, F)` are the rewards of this
        rank's rows; their step rewards are in `self.batch.step_rewards`.
        """

    def credit_late(
        self, inputs: dict[str, Any], per_token_logps: torch.Tensor, extras: tuple[torch.Tensor, ...]
    ) -> None:
        """
        Called in each pass of the loss. Changes the micro-batch `inputs` in place, if `credit_tokens` left that to its
        first pass.
        """

    def on_rollouts(self, output: dict[str, Any], batch: GenerationBatch) -> None:
        """Called in training for each generation batch, with TRL's tensors of it."""

    def on_new_buffer(self, micro_batches: list[dict[str, Any]]) -> None:
        """Called when TRL has split a generation batch into micro-batches. They may be changed in place."""

    def pass_without_loss(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A pass over a whole generation batch. `forward` is TRL's pass, which `args` and `kwargs` are for."""
        return forward(*args, **kwargs)

    def with_extras(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """TRL's pass `forward`, returning further tensors after TRL's three."""
        return forward

    def restate_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss on a micro-batch, rescaled to TRL's own micro-batches. Corrects TRL's metrics too."""
        return loss

    def loss_state(self) -> dict[str, Any]:
        """What the loss of a micro-batch changes beside metrics, so that it can be computed again."""
        return {}

    def load_loss_state(self, state: dict[str, Any]) -> None:
        """The reverse of [`loss_state`]."""

    @property
    def fewest_rows(self) -> int:
        """Rows that a pass has at least."""
        return 1

    def added_loss(self, loss: torch.Tensor, model: Any, inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Any:
        """The loss with further terms. `outputs` are the tensors of its pass, including those of `with_extras`."""
        return loss

    # Generation and selection

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if all(isinstance(prompt, TokenizedPrompt) for prompt in prompts):
            return [prompt.input_ids for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate(self, prompts: list[Any]) -> Generation:
        generate = super()._generate
        with awake(self, self.draws_rounds or self.args.generation_chunks > 1):
            return self._generate_and_select(generate, prompts)

    def _generate_and_select(self, generate: Callable[..., Generation], prompts: list[Any]) -> Generation:
        batch = self.batch
        with sampling_as_told(self):
            generation = generate_in_chunks(self, generate, prompts)
        if not (batch.round_only or (self.selects and self.model.training)):
            return generation
        scored = self._score(prompts, generation)
        if batch.round_only:
            raise _RoundScored(scored)
        batch.rounds = [scored]
        batch.selection = selection = self.select_groups()
        exchange = RolloutExchange(batch.rounds, self.accelerator.process_index, self.accelerator.num_processes)
        size = selection.num_generations
        keys = [(ref.round, ref.group * size + i) for ref in selection.slots for i in range(size)]
        trained_rows = selection.rows(selection.sources)
        logged = exchange.fetch(keys)
        # Without copies, the rows that are trained on are those that are logged
        copied = trained_rows != list(range(len(keys)))
        trained = exchange.fetch([keys[row] for row in trained_rows]) if copied else logged
        starts = [0, *accumulate(len(scored.rewards) for scored in batch.rounds)]
        rewards = torch.cat([scored.rewards for scored in batch.rounds])
        batch.rewards = rewards[[starts[round_] + row for round_, row in keys]]
        batch.step_rewards = [rollout.step_rewards for rollout in trained]
        self._bind(prompts, logged, trained)
        return generation_of(logged, trained)

    def _bind(self, prompts: list[Any], logged: list[Rollout], trained: list[Rollout]) -> None:
        """Set what TRL holds for each row to what belongs to the selected rows."""
        # TRL renders the prompts again if there are images. Otherwise it only logs them.
        images = any(rollout.images for rollout in trained)
        prompts[:] = [rollout.prompt for rollout in (trained if images else logged)]
        self.batch.logged_prompts = [rollout.prompt for rollout in logged] if images else None
        if self.environment_factories is not None:
            names = [rollout.row.get("environment") if self._multi_environment else None for rollout in trained]
            self._batch_environments = names
        self._pending_extra_logs.clear()
        for column in {column for rollout in logged for column in rollout.extra_logs}:
            self._pending_extra_logs[column] = [rollout.extra_logs.get(column) for rollout in logged]

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
        Generate and score a round, without tensors and log-probabilities. `rows` are this rank's data set rows, one
        for each completion.
        """
        self.check_rows(rows)
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
        if batch.selection is not None:  # TRL asks for rewards that were computed to select groups
            assert batch.rewards is not None
            return batch.rewards
        with self.reward_watch.watching():
            hand_rewards_to_trl(self)
            returned: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        raise_reward_faults(returned, self.reward_funcs, self.reward_func_names)
        rewards = self.judged(returned)
        guarded = {i: func for i, func in enumerate(self.reward_funcs) if isinstance(func, RewardGuard)}
        batch.step_rewards = [
            {column: value for column, value in zip(guarded, values, strict=True) if is_by_step(value)}
            for values in zip(*(func.returned for func in guarded.values()), strict=True)
        ] or [{} for _ in kwargs.get("prompts") or args[1]]
        batch.rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        training = self.model.training  # read now, because generation may change the model's mode
        self.batch = batch = GenerationBatch(training=training)
        try:
            batch.rows = self.rows_to_generate(inputs) if training else inputs
            self.check_rows(batch.rows)
            batch.credits_late = training and self.may_credit_late and self.previewed is None
            length = self.completion_length() if training else None
            with self._asking_for_passes(self), self._limiting_completions(length):
                output: dict[str, Any] = super()._generate_and_score_completions(batch.rows)
            self._credit(output)
            if batch.logged_prompts is not None:
                self._relog("prompt", gather_object(batch.logged_prompts))
            groups = batch.generated_groups(self.num_generations)
            if len(batch.rounds) > 1 or not groups.equal:
                named = self.reward_weights, self.reward_func_names, groups
                restate_rounds(self.train_metrics, batch.rounds, *named, zero_std=self._compares_within_groups)
            if training:
                self.on_rollouts(output, batch)
            else:
                assert batch.rewards is not None
                self._evaluated = batch.rewards, float(output["num_items_in_batch"])
            return output
        except Exception as error:
            # Reward faults are raised on every rank. Other errors may be raised on one rank, but saving takes all
            # ranks.
            if isinstance(error, RewardFunctionError) or self.accelerator.num_processes == 1:
                self.save_before_stopping(error)
            raise
        finally:
            self.batch = GenerationBatch()
            discard_rewards(self)

    def _credit(self, output: dict[str, Any]) -> None:
        """Put our advantages into TRL's output, give copies the advantages of their source, and credit tokens."""
        rewards, selection, training = self.batch.rewards, self.batch.selection, self.batch.training
        assert rewards is not None
        advantages = self.estimate_advantages(rewards, output, training)
        copied = selection is not None and selection.sources != list(range(len(selection.slots)))
        per_rank = len(output["advantages"])
        start = self.accelerator.process_index * per_rank
        here = slice(start, start + per_rank)
        if advantages is not None:
            advantages = advantages.nan_to_num(nan=0.0)
            self._relog("advantages", advantages.tolist())
        elif copied:
            # TRL computed them on the batch without copies
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
        if self.memory_fallback.again:
            return self._micro_batch_again
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

    @property
    def _micro_batch_again(self) -> dict[str, Any]:
        """The micro-batch that was handed out last, in TRL's buffer."""
        assert self._buffered_inputs is not None
        same: dict[str, Any] = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return same

    def buffer_step_slices(self) -> list[tuple[int, int]]:
        """Parts of TRL's new buffer whose micro-batches share an optimizer step, see [`step_slices`]."""
        accumulation = self.args.gradient_accumulation_steps
        until_update = self.current_gradient_accumulation_steps - (self._step - self._window[1])
        return step_slices(self.args.steps_per_generation, self._step, until_update, accumulation, self.num_iterations)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.with_extras(super()._get_per_token_logps_and_entropies)
        forward = sharing_prefixes(forward, self.sharing, self.accelerator.unwrap_model)
        if self._loss_inputs is None:
            result = self.pass_without_loss(forward, *args, **kwargs)
            self.batch.extras = self.batch.extras or result[3:]  # those of the policy, whose pass comes first
            return result[:3]
        # The pass of the loss. TRL reads advantages and old log-probabilities from its inputs only after the pass.
        result = in_parts(forward, self.memory_fallback.parts, self.fewest_rows)(*args, **kwargs)
        inputs, logps = self._loss_inputs, result[0]
        self._loss_pass = result
        self.credit_late(self._buffer_inputs, logps.detach(), result[3:])
        self.memory_fallback.keep_metrics()
        inputs.update(self._buffer_inputs)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        replaced = {
            "advantages": self.advantages_for_loss(logps, inputs, mask),
            "old_per_token_logps": self.old_logps_for_loss(logps, inputs, mask),
        }
        inputs.update({name: value for name, value in replaced.items() if value is not None})
        return result[:3]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.memory_fallback.begin()
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if not self.memory_fallback.under_way:  # it ran out in generation
                raise
            try:
                self.memory_fallback.fall_back(error, self._micro_batch_again, self.fewest_rows)
            except torch.OutOfMemoryError:
                if self.accelerator.num_processes == 1:
                    self.save_before_stopping(error)
                raise
        # Not within `except`, where the frames of the error would keep their tensors
        self.memory_fallback.undo()
        self.memory_fallback.again = True
        try:
            return self.training_step(*args, **kwargs)
        finally:
            self.memory_fallback.again = False

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.memory_fallback.under_way = True
        self._loss_inputs, self._buffer_inputs = dict(inputs), inputs
        try:
            loss: torch.Tensor = super()._compute_loss(model, self._loss_inputs)
            outputs, self._loss_pass = self._loss_pass, ()
        finally:
            self._loss_inputs, self._buffer_inputs = None, {}
        return self.added_loss(self.restate_loss(loss, inputs), model, inputs, outputs)

    # Evaluation

    @property
    def _compares_within_groups(self) -> bool:
        """Whether TRL's `frac_reward_zero_std` is about groups, and not about the batch."""
        return self.scale_rewards != "batch" and self.multi_objective_aggregation != "normalize_then_sum"

    @property
    def rows_together(self) -> int:
        return self.num_generations_eval

    def complete_batch(self, batch: EvaluatedBatch, inputs: Any) -> None:
        assert self._evaluated is not None
        rewards, tokens = self._evaluated
        batch.rewards = rewards[: len(rewards) // batch.copies]
        batch.weights |= token_weights(self.loss_type, self.importance_sampling_level == "sequence", tokens)

    def pool_batches(self, values: dict[str, list[float]], batches: list[EvaluatedBatch]) -> dict[str, float | None]:
        rewards = [batch.rewards for batch in batches if batch.rewards is not None]
        return pool_evaluation(
            values,
            [len(of_batch) for of_batch in rewards],
            torch.cat(rewards),
            self.reward_weights,
            self.reward_func_names,
            self.num_generations_eval,
            zero_std=self._compares_within_groups,
        )

    @contextmanager
    def evaluation_apart(self, metric_key_prefix: str) -> Iterator[None]:
        before, self._evaluated_as = self._evaluated_as, metric_key_prefix
        try:
            with completions_apart(self):
                yield
        finally:
            self._evaluated_as = before

    def closing_metrics(self) -> dict[str, float]:
        """What is logged once, when training ends."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:
            logs |= self.closing_metrics()
        if self._evaluated_as is None or not self.log_completions:
            super().log(logs, start_time)
            return
        with table_of_evaluation(self, self._evaluated_as):
            super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with without_reward_adapters(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)

    def rows_seen_in_training(self) -> Any:
        """The training set with the columns that rows from the loader have."""
        dataset: Any = self.train_dataset
        return self._remove_unused_columns(dataset, description="refill")
