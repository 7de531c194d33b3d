"""
Micro-batches that fit their rows: what is cut, what a window of several ranks becomes; then, on tiny models, that
outputs and gradients stay what they were. How rows are dealt is in `test_packing.py`, which saving is exact when in
`test_exactness.py`, training as a whole in `tests/trainers/test_fit.py`.
"""

import copy
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import tiny
import torch
import trl
from comparing import relative_error

import trl_ext
from trl_ext.rollouts.exactness import ExactSavings, has_relative_positions
from trl_ext.rollouts.micro_batches import FIT, SOURCE_ROW, SavedCompute, cut, describe, fit_step, fitted_pass
from trl_ext.rollouts.packing import Width
from trl_ext.trainers.seams.probes import preview_micro_batches


# Rows and their tensors


def batch_of(
    rows: list[tuple[int, int]], width: Width, first: int = 0, advantages: list[float] | None = None, **more: Any
) -> dict[str, Any]:
    """A micro-batch of rows with these lengths of prompt and completion; token `1000 · row + column`, padding 0."""
    size = len(rows)
    number = (torch.arange(size) + first + 1).unsqueeze(1) * 1000
    prompts, completions = torch.tensor(rows).unsqueeze(-1).unbind(1)
    prompt_mask = (torch.arange(width.prompt) >= width.prompt - prompts).long()
    completion_mask = (torch.arange(width.completion) < completions).long()
    completion_ids = (number + 100 + torch.arange(width.completion)) * completion_mask
    given = torch.tensor([1.0] * size if advantages is None else advantages)
    return {
        # Counted from the last token, so that left padding doesn't matter
        "prompt_ids": (number + torch.arange(width.prompt).flip(0)) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": given,
        "num_items_in_batch": torch.tensor(99),
        "old_per_token_logps": -completion_ids.float() / 1e4,
        **more,
    }


class TestCut:
    old, new = Width(4, 6), Width(2, 3)

    def cut(self, **more: Any) -> dict[str, Any]:
        return cut(batch_of([(2, 3), (1, 2)], self.old, **more), self.old, self.new)

    def test_prompts_lose_columns_on_the_left_and_completions_on_the_right(self):
        batch = self.cut()
        assert batch["prompt_ids"].tolist() == [[1001, 1000], [0, 2000]]
        assert batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]
        assert batch["completion_ids"].tolist() == [[1100, 1101, 1102], [2100, 2101, 0]]
        assert batch["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch["old_per_token_logps"].shape == (2, 3)

    def test_every_value_of_a_token_is_cut_like_its_completion(self, subtests):
        for name in [
            "importance_sampling_ratio",
            "tool_mask",
            "advantages",
            "ref_per_token_logps",
            "sampling_per_token_logps",
        ]:
            with subtests.test(name=name):
                values = torch.arange(12.0).view(2, 6)
                batch = cut({**batch_of([(2, 3), (1, 2)], self.old), name: values}, self.old, self.new)
                assert batch[name].tolist() == values[:, :3].tolist()

    def test_token_types_stand_over_prompt_and_completion(self, subtests):
        for name in ["token_type_ids", "mm_token_type_ids"]:
            with subtests.test(name=name):
                batch = self.cut(**{name: torch.arange(20).view(2, 10)})
                # Columns 2 and 3 of the prompt, 0 to 2 of the completion
                assert batch[name].tolist() == [[2, 3, 4, 5, 6], [12, 13, 14, 15, 16]]

    def test_what_is_not_by_token_stays(self):
        more = {
            "importance_sampling_ratio": torch.ones(2, 1),
            "num_items_in_batch": torch.tensor(7),
            "num_images": [1, 1],
            "pixel_values": torch.ones(2, 6),  # as wide as a completion, by chance
            "pixel_attention_mask": torch.ones(2, 6),
            "image_grid_thw": torch.ones(2, 3),
            "image_sizes": torch.ones(2, 6),
            "spatial_shapes": torch.ones(2, 6),
        }
        batch = self.cut(**more)
        assert all(batch[name] is value for name, value in more.items())
        assert batch["advantages"].shape == (2,)

    def test_nothing_is_lost_when_nothing_is_cut(self):
        before = batch_of([(2, 3), (1, 2)], self.old)
        after = cut(before, self.old, self.old)
        assert all(torch.equal(after[name], value) for name, value in before.items())


class TestDescribe:
    width = Width(3, 4)
    rows = [(2, 3), (3, 1), (1, 0), (1, 4)]

    def describe(self, skip_dead: bool, **more: Any) -> Any:
        return describe(batch_of(self.rows, self.width, **more), skip_dead)

    def test_lengths_and_tokens(self):
        rows = self.describe(skip_dead=False)
        assert rows.prompt.tolist() == [2, 3, 1, 1]
        assert rows.completion.tolist() == rows.tokens.tolist() == [3, 1, 0, 4]
        assert rows.contributes.tolist() == [True, True, False, True]
        assert rows.source.tolist() == [-1] * 4
        assert describe({**batch_of(self.rows, self.width), SOURCE_ROW: torch.arange(4)}, False).source.tolist() == [
            *range(4)
        ]

    def test_only_an_exact_zero_is_dead(self):
        advantages = [0.0, 1e-9, 1.0, -1e-30]
        assert self.describe(True, advantages=advantages).contributes.tolist() == [False, True, False, True]
        assert self.describe(False, advantages=advantages).contributes.tolist() == [True, True, False, True]
        assert self.describe(True, advantages=[-0.0] * 4).contributes.tolist() == [False] * 4

    def test_advantages_by_token_live_where_the_loss_sees_them(self):
        advantages = torch.zeros(4, 4)
        advantages[0, 2] = 1.0  # the last token of its completion
        advantages[1, 1] = 1.0  # padding
        advantages[3, 0] = -1.0  # an environment's token
        tool_mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
        batch = {**batch_of(self.rows, self.width), "advantages": advantages, "tool_mask": tool_mask}
        rows = describe(batch, skip_dead=True)
        assert rows.contributes.tolist() == [True, False, False, False]
        # What an environment wrote isn't in the loss, but the columns after it need it
        assert rows.tokens.tolist() == [2, 1, 0, 3]
        assert rows.completion.tolist() == [3, 1, 0, 4]

    def test_a_row_that_is_an_environments_altogether(self):
        tool_mask = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
        batch = {**batch_of(self.rows, self.width), "tool_mask": tool_mask}
        for skip_dead in (False, True):
            assert describe(batch, skip_dead).contributes.tolist() == [False, True, False, True]


# A window, on one process and on several


@dataclass
class Rank:
    """An accelerator of one process; `gather` is a meeting of threads."""

    process_index: int
    num_processes: int
    barrier: threading.Barrier
    shared: dict[int, torch.Tensor]
    device = torch.device("cpu")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shared[self.process_index] = tensor
        self.barrier.wait(timeout=10)
        shapes = {value.shape for value in self.shared.values()}
        gathered = torch.cat([self.shared[i] for i in range(self.num_processes)]) if len(shapes) == 1 else None
        self.barrier.wait(timeout=10)
        assert gathered is not None, f"ranks gathered tensors of {shapes}"
        return gathered


EVERYTHING = ExactSavings(trim_prompts=True, regroup=True, skip_dead=True, weigh_copies=True)


def fitted_on(
    of_ranks: list[list[dict[str, Any]]],
    savings: ExactSavings = EVERYTHING,
    loss_type: str = "dapo",
    multiple: int = 1,
) -> tuple[list[list[dict[str, Any]]], SavedCompute]:
    """Fitted micro-batches of each rank, and what was saved (the same on all)."""
    barrier, shared, counts = threading.Barrier(len(of_ranks)), {}, [SavedCompute() for _ in of_ranks]

    def fit(rank: int) -> list[dict[str, Any]]:
        accelerator: Any = Rank(rank, len(of_ranks), barrier, shared)
        try:
            return fit_step(of_ranks[rank], savings, accelerator, loss_type, multiple, counts[rank])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(of_ranks)) as threads:
        fitted = list(threads.map(fit, range(len(of_ranks))))
    assert all(count == counts[0] for count in counts)
    return fitted, counts[0]


def row_numbers(batch: dict[str, Any]) -> list[int]:
    """Which rows of [`batch_of`] these are; −1 for one without weight."""
    live = batch["completion_mask"].any(dim=1)
    return [int(i) // 1000 - 1 if alive else -1 for i, alive in zip(batch["prompt_ids"][:, -1], live, strict=True)]


def random_window(
    generator: random.Random, ranks: int, count: int = 3, per_batch: int = 4
) -> tuple[list[list[dict[str, Any]]], list[tuple[int, int]], list[float]]:
    """Micro-batches of each rank, with widths of its own; lengths and advantages of all rows."""
    of_ranks, lengths, advantages = [], [], []
    for _ in range(ranks):
        rows = [(generator.randint(1, 9), generator.randint(0, 12)) for _ in range(count * per_batch)]
        values = [generator.choice([0.0, 1.0, -0.5, 1e-9]) for _ in rows]
        width = Width(max(p for p, _ in rows), max(2, *(c for _, c in rows)))
        first = len(lengths)
        starts = range(0, len(rows), per_batch)
        stop = per_batch
        of_ranks.append(
            [batch_of(rows[i : i + stop], width, first + i, advantages=values[i : i + stop]) for i in starts]
        )
        lengths += rows
        advantages += values
    return of_ranks, lengths, advantages


class TestFitWindow:
    def test_rows_that_the_loss_needs_are_there_once_and_whole(self, subtests):
        for ranks, seed in product([1, 2, 3], range(8)):
            with subtests.test(ranks=ranks, seed=seed):
                generator = random.Random(seed)
                of_ranks, lengths, advantages = random_window(generator, ranks)
                before = copy.deepcopy(of_ranks)
                fitted, saved = fitted_on(of_ranks)
                found = []
                for of_rank in fitted:
                    assert len(of_rank) == 3
                    for batch in of_rank:
                        for i, row in enumerate(row_numbers(batch)):
                            if row < 0:
                                continue
                            found.append(row)
                            prompt, completion = lengths[row]
                            number = (row + 1) * 1000
                            ids = [*range(number + prompt - 1, number - 1, -1)]
                            assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == ids
                            ids = [*range(number + 100, number + 100 + completion)]
                            assert batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist() == ids
                            logps = batch["old_per_token_logps"][i][:completion]
                            torch.testing.assert_close(logps, -torch.tensor(ids, dtype=torch.float) / 1e4)
                            assert batch["advantages"][i] == torch.tensor(advantages[row])
                        assert batch["num_items_in_batch"] == 99
                needed = [i for i, (_, c) in enumerate(lengths) if c and advantages[i]]
                assert sorted(found) == needed
                # What TRL dealt is left as it is
                for of_rank, as_it_was in zip(of_ranks, before, strict=True):
                    for batch, old in zip(of_rank, as_it_was, strict=True):
                        assert all(torch.equal(batch[name], value) for name, value in old.items())
                assert (saved.rows, saved.skipped_rows) == (len(lengths), len(lengths) - len(needed))
                slots_trl = sum(len(of_rank) * 4 * sum(as_tuple(of_rank[0])) for of_rank in of_ranks)
                assert saved.token_slots_trl == slots_trl
                assert saved.token_slots == sum(len(b["advantages"]) * sum(as_tuple(b)) for of in fitted for b in of)
                assert saved.useful_tokens == sum(sum(lengths[i]) for i in needed)
                own = [sum(as_tuple(of_ranks[i // 12][0])) for i in range(len(lengths))]
                assert saved.dead_slots == sum(own[i] for i in range(len(lengths)) if i not in needed)

    def test_what_micro_batches_stand_for(self, subtests):
        for ranks, loss_type in product([1, 2], ["grpo", "dapo"]):
            with subtests.test(ranks=ranks, loss_type=loss_type):
                of_ranks, lengths, advantages = random_window(random.Random(1), ranks)
                fitted, _ = fitted_on(of_ranks, loss_type=loss_type)
                needed = [i for i, (_, c) in enumerate(lengths) if c and advantages[i]]
                for together in zip(*fitted, strict=True):
                    rows = [row for batch in together for row in row_numbers(batch)]
                    real = [row for row in rows if row >= 0]
                    for batch in together:
                        fit = batch[FIT]
                        assert fit.scale == (len(rows) / ranks / 4 if loss_type == "grpo" else 1.0)
                        assert (fit.rows, fit.fillers) == (len(real), len(rows) - len(real))
                        assert fit.tokens == sum(lengths[row][1] for row in real)
                        assert (fit.computed_rows, fit.computed_tokens) == (
                            len(needed),
                            sum(lengths[i][1] for i in needed),
                        )
                        assert (fit.all_rows, fit.all_tokens) == (len(lengths), sum(c for _, c in lengths))
                        assert fit.micro_batches == 3

    def test_copies_are_weights(self):
        rows, width = [(2, 3), (2, 3), (1, 2), (2, 3)], Width(2, 3)
        batch = batch_of(rows, width, advantages=[0.5, 0.5, -1.0, 0.5])
        batch[SOURCE_ROW] = torch.tensor([0, 0, 2, 0])
        fitted, saved = fitted_on([[batch]])
        got = dict(zip(row_numbers(fitted[0][0]), fitted[0][0]["advantages"].tolist(), strict=True))
        assert got == {0: 1.5, 2: -1.0}  # 3 · 0.5
        assert batch["advantages"].tolist() == [0.5, 0.5, -1.0, 0.5]
        assert saved.merged_rows == 2 and saved.skipped_rows == 0
        fit = fitted[0][0][FIT]
        assert (fit.computed_rows, fit.all_rows, fit.computed_tokens, fit.all_tokens) == (2, 4, 5, 11)

    def test_copies_on_other_ranks_and_in_other_micro_batches_too(self):
        rows, width = [(2, 3), (1, 2)], Width(2, 3)
        of_ranks = [
            [{**batch_of(rows, width, first=4 * rank + 2 * i), SOURCE_ROW: torch.tensor([7, 9])} for i in range(2)]
            for rank in range(2)
        ]
        fitted, saved = fitted_on(of_ranks)
        got = [
            (row, float(a))
            for of_rank in fitted
            for batch in of_rank
            for row, a in zip(row_numbers(batch), batch["advantages"], strict=True)
            if row >= 0
        ]
        assert sorted(got) == [(0, 4.0), (1, 4.0)]
        assert saved.merged_rows == 6

    def test_copies_weigh_the_advantage_of_every_token(self):
        batch = batch_of([(2, 3), (2, 3)], Width(2, 3))
        batch |= {"advantages": torch.tensor([[1.0, -2.0, 0.0]] * 2), SOURCE_ROW: torch.tensor([1, 1])}
        fitted, _ = fitted_on([[batch]])
        assert fitted[0][0]["advantages"].tolist() == [[2.0, -4.0, 0.0]]

    def test_rows_without_a_source_are_no_copies(self):
        batch = batch_of([(2, 3), (2, 3)], Width(2, 3)) | {SOURCE_ROW: torch.tensor([-1, -1])}
        fitted, saved = fitted_on([[batch]])
        assert sorted(row_numbers(fitted[0][0])) == [0, 1] and saved.merged_rows == 0

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_images_only_lose_the_padding_of_completions(self, ranks):
        """Their tensors and lists are not one row a completion. One rank without images follows the others."""
        width = Width(4, 6)
        of_ranks = [
            [batch_of([(2, 3), (1, 2)], width, first=4 * rank + 2 * i, advantages=[0.0, 1.0]) for i in range(2)]
            for rank in range(ranks)
        ]
        for i, batch in enumerate(of_ranks[-1]):
            batch |= {"pixel_values": torch.rand(3, 6), "num_images": [1, 2], "token_type_ids": torch.rand(2, 10)}
            batch["completion_mask"][i, 3:] = 0
        pixels = [batch["pixel_values"] for batch in of_ranks[-1]]
        fitted, saved = fitted_on(of_ranks)
        for rank, of_rank in enumerate(fitted):
            for i, batch in enumerate(of_rank):
                assert row_numbers(batch) == [4 * rank + 2 * i, 4 * rank + 2 * i + 1]
                assert as_tuple(batch) == (4, 3)
                assert FIT not in batch
        for batch, pixel_values in zip(fitted[-1], pixels, strict=True):
            assert batch["pixel_values"] is pixel_values and batch["num_images"] == [1, 2]
            assert batch["token_type_ids"].shape == (2, 7)
        assert saved.skipped_rows == saved.regrouped_rows == 0

    def test_where_rows_keep_their_micro_batch(self, subtests):
        for ranks in [1, 2]:
            with subtests.test(ranks=ranks):
                of_ranks, lengths, _ = random_window(random.Random(3), ranks)
                fitted, saved = fitted_on(of_ranks, ExactSavings(True, False, False, False))
                for rank, of_rank in enumerate(fitted):
                    for i, batch in enumerate(of_rank):
                        rows = range(12 * rank + 4 * i, 12 * rank + 4 * i + 4)
                        longest = [max(lengths[row][side] for row in rows) for side in (0, 1)]
                        assert as_tuple(batch) == (longest[0], max(2, longest[1]))
                        assert (batch["prompt_ids"][:, -1] // 1000 - 1).tolist() == [*rows]
                assert saved.token_slots == sum(4 * sum(as_tuple(b)) for of_rank in fitted for b in of_rank)
                assert not saved.skipped_rows and not saved.regrouped_rows

    def test_absolute_positions_stay(self, subtests):
        """TRL counts positions from the first column of the rank's own padding: every row keeps its prompt width."""
        for ranks, regroup, seed in product([1, 2, 3], [True, False], range(4)):
            with subtests.test(ranks=ranks, regroup=regroup, seed=seed):
                of_ranks, lengths, advantages = random_window(random.Random(seed), ranks)
                before = [as_tuple(of_rank[0])[0] for of_rank in of_ranks]
                fitted, _ = fitted_on(of_ranks, ExactSavings(False, regroup, regroup, regroup))
                found = []
                for of_rank in fitted:
                    for batch in of_rank:
                        for row in row_numbers(batch):
                            if row >= 0:
                                found.append(row)
                                assert as_tuple(batch)[0] == before[row // 12]
                needed = [i for i, (_, c) in enumerate(lengths) if c and (advantages[i] or not regroup)]
                assert sorted(found) == needed

    def test_the_whole_width_stays_in_wide_batches(self, subtests):
        """Every row keeps the columns of its own rank, and with the widest as limit no other batch is concerned."""
        for ranks, regroup, seed in product([1, 2, 3], [True, False], range(4)):
            with subtests.test(ranks=ranks, regroup=regroup, seed=seed):
                of_ranks, lengths, advantages = random_window(random.Random(seed), ranks)
                before = [as_tuple(of_rank[0]) for of_rank in of_ranks]
                widest = max(prompt for prompt, _ in before) + max(completion for _, completion in before)
                savings = ExactSavings(True, regroup, regroup, regroup, full_width_from=widest)
                fitted, _ = fitted_on(of_ranks, savings)
                found = []
                for of_rank in fitted:
                    for batch in of_rank:
                        rows = [row for row in row_numbers(batch) if row >= 0]
                        found += rows
                        assert all(as_tuple(batch) == before[row // 12] for row in rows)
                assert sorted(found) == [i for i, (_, c) in enumerate(lengths) if c and (advantages[i] or not regroup)]
                narrow, _ = fitted_on(of_ranks, replace(savings, full_width_from=widest + 1))
                assert any(as_tuple(b) != before[rank] for rank, of_rank in enumerate(narrow) for b in of_rank)

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_copies_with_another_padding_are_no_copies(self, ranks):
        """Where padding changes the model's outputs, copies on ranks of other widths are computed."""
        rows, widths = [(2, 3)], [Width(2, 3), Width(2, 5)]
        of_ranks = [
            [{**batch_of(rows, widths[rank], first=2 * rank + i), SOURCE_ROW: torch.tensor([7])} for i in range(2)]
            for rank in range(ranks)
        ]
        _, saved = fitted_on(of_ranks, replace(EVERYTHING, full_width_from=0))
        assert saved.merged_rows == ranks
        assert fitted_on(of_ranks)[1].merged_rows == 2 * ranks - 1

    @pytest.mark.parametrize("per_batch", [1, 2, 4])
    def test_micro_batches_have_two_rows_where_one_is_too_few(self, per_batch, subtests):
        for ranks, seed in product([1, 2], range(4)):
            with subtests.test(ranks=ranks, seed=seed):
                of_ranks, lengths, advantages = random_window(random.Random(seed), ranks, per_batch=per_batch)
                fitted, _ = fitted_on(of_ranks, replace(EVERYTHING, fewest_rows=2))
                sizes = {len(batch["prompt_ids"]) for of_rank in fitted for batch in of_rank}
                assert sizes == {1} if per_batch == 1 else min(sizes) >= 2
                found = [row for of_rank in fitted for batch in of_rank for row in row_numbers(batch) if row >= 0]
                assert sorted(found) == [i for i, (_, c) in enumerate(lengths) if c and advantages[i]]

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_rows_without_weight_do_nothing_to_the_loss(self, ranks):
        """They are neutral in all that enters it: ratios of 1 (a ratio of infinity times a mask of 0 is not a 0)."""
        of_ranks = [
            [
                {
                    **batch_of([(2, 3)], Width(2, 3), first=2 * rank + i, advantages=[0.0]),
                    "old_per_token_logps": torch.full((1, 3), -200.0),
                    "importance_sampling_ratio": torch.full((1, 3), 3.0),
                }
                for i in range(2)
            ]
            for rank in range(ranks)
        ]
        fitted, saved = fitted_on(of_ranks)
        assert saved.skipped_rows == 2 * ranks
        for of_rank in fitted:
            for batch in of_rank:
                assert as_tuple(batch) == (1, 2)
                assert not batch["completion_mask"].any()
                assert not batch["old_per_token_logps"].any()
                assert (batch["importance_sampling_ratio"] == 1).all()
                assert batch[FIT].fillers == ranks and batch[FIT].rows == 0

    def test_columns_come_in_multiples(self):
        of_ranks, _, _ = random_window(random.Random(0), 1, count=4)
        for batch in fitted_on(of_ranks, multiple=4)[0][0]:
            for columns, widest in zip(as_tuple(batch), as_tuple(of_ranks[0][0]), strict=True):
                assert columns % 4 == 0 or columns == widest


def as_tuple(batch: dict[str, Any]) -> tuple[int, int]:
    """Columns of prompts and completions."""
    return batch["prompt_ids"].size(1), batch["completion_ids"].size(1)


# Passes without gradient


@dataclass
class Forward:
    """TRL's pass for a model whose log-probabilities are the tokens; keeps what it was called with."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        pixel_values: Any = None,
        num_images: Any = None,
        token_type_ids: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        self.calls.append({name: value for name, value in locals().items() if name != "self"})
        logps = (input_ids * attention_mask)[:, -logits_to_keep:].float()
        return logps, logps / 2 if compute_entropy else None, None


class TestFittedPass:
    width = Width(6, 8)
    lengths = [(2, 3), (6, 8), (1, 1), (3, 0), (2, 4), (1, 8), (4, 2)]

    def inputs(self) -> dict[str, Any]:
        batch = batch_of(self.lengths, self.width)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return {"model": "policy", "input_ids": ids, "attention_mask": mask, "logits_to_keep": 8, "batch_size": 2}

    @pytest.mark.parametrize("trim_prompts", [True, False])
    @pytest.mark.parametrize("multiple", [1, 4])
    def test_the_same_values_with_zeros_in_padding(self, trim_prompts, multiple):
        forward, inputs = Forward(), self.inputs()
        savings = replace(EVERYTHING, trim_prompts=trim_prompts)
        logps, entropies, aux_loss = fitted_pass(forward, savings, multiple, **inputs, compute_entropy=True)
        whole, halves, _ = Forward()(**inputs, compute_entropy=True)
        assert torch.equal(logps, whole) and torch.equal(entropies, halves) and aux_loss is None
        assert len(forward.calls) == 4  # seven rows in twos
        assert sum(len(call["input_ids"]) for call in forward.calls) == 7
        used = sum(call["input_ids"].numel() for call in forward.calls)
        assert used < 7 * 14
        for call in forward.calls:
            prompt = call["input_ids"].size(1) - call["logits_to_keep"]
            assert prompt == 6 or trim_prompts
            assert call["logits_to_keep"] % multiple == 0 or multiple == 1
            assert call["logits_to_keep"] >= 2

    def test_twice_the_same_row_where_one_is_too_few(self):
        forward, inputs = Forward(), self.inputs()
        logps, _, _ = fitted_pass(forward, replace(EVERYTHING, fewest_rows=2), 1, **inputs)
        assert torch.equal(logps, Forward()(**inputs)[0])
        assert min(len(call["input_ids"]) for call in forward.calls) == 2
        alone = Forward()
        fitted_pass(alone, replace(EVERYTHING, fewest_rows=2), 1, **inputs | {"batch_size": 1})
        assert {len(call["input_ids"]) for call in alone.calls} == {1}

    @pytest.mark.parametrize(("columns", "calls"), [(14, 1), (15, 4)])
    def test_the_whole_width_in_wide_batches(self, columns, calls):
        forward, inputs = Forward(), self.inputs()
        logps, _, _ = fitted_pass(forward, replace(EVERYTHING, full_width_from=columns), 1, **inputs)
        assert torch.equal(logps, Forward()(**inputs)[0])
        assert len(forward.calls) == calls

    def test_without_entropies(self):
        logps, entropies, _ = fitted_pass(Forward(), EVERYTHING, 1, **self.inputs())
        assert torch.equal(logps, Forward()(**self.inputs())[0]) and entropies is None

    def test_arguments_by_position_and_token_types(self):
        forward, inputs = Forward(), self.inputs()
        types = torch.arange(7 * 14).view(7, 14)
        fitted_pass(forward, EVERYTHING, 1, *inputs.values(), token_type_ids=types)
        known = {row[-1]: row for row in inputs["input_ids"][:, :6].tolist()}
        assert len(known) == 7
        for call in forward.calls:
            keep, prompt = call["logits_to_keep"], call["input_ids"].size(1) - call["logits_to_keep"]
            for row, got in zip(call["input_ids"], call["token_type_ids"], strict=True):
                number = int(row[prompt - 1]) // 1000 - 1
                assert got.tolist() == types[number, 6 - prompt : 6 + keep].tolist()

    @pytest.mark.parametrize(
        "more",
        [
            {"pixel_values": torch.ones(7, 2), "num_images": [1] * 7},
            {"num_images": [0] * 7},
            {"compute_aux_loss": True},
            {"batch_size": None},
        ],
    )
    def test_it_passes_on_what_it_does_not_know(self, more):
        forward, inputs = Forward(), {**self.inputs(), **more}
        found = fitted_pass(forward, EVERYTHING, 1, **inputs)
        assert len(forward.calls) == 1
        assert all(forward.calls[0][name] is value for name, value in inputs.items())
        assert torch.equal(found[0], Forward()(**inputs)[0])

    @pytest.mark.parametrize("model", [tiny.qwen2, tiny.gpt2])
    def test_trls_own_pass(self, model, tmp_path):
        config = trl.GRPOConfig(**tiny.cpu_settings(tmp_path))
        trainer = trl.GRPOTrainer(
            model=model(), reward_funcs=tiny.constant, args=config, train_dataset=tiny.prompts(), **tokenized()
        )
        ids, mask = (torch.cat(parts, dim=1) for parts in zip(*ragged_ids(), strict=True))
        forward = trainer._get_per_token_logps_and_entropies
        arguments = (trainer.model, ids, mask, 8, 3)
        relative = has_relative_positions(trainer.model)
        with torch.no_grad():
            logps, entropies, _ = forward(*arguments, compute_entropy=True)
            savings = replace(EVERYTHING, trim_prompts=relative)
            fitted = fitted_pass(forward, savings, 1, *arguments, compute_entropy=True)
            trimmed = fitted_pass(forward, EVERYTHING, 1, *arguments)[0]
        padding = mask[:, 6:] == 0
        assert padding.any() and not logps[padding].any() and not fitted[0][padding].any()
        torch.testing.assert_close(fitted[0], logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fitted[1], entropies, atol=1e-5, rtol=1e-5)
        # Which is what the padding of absolute positions is kept for
        assert relative == torch.allclose(trimmed, logps, atol=1e-5)


def tokenized() -> dict[str, Any]:
    return {"processing_class": tiny.tokenizer()}


def ragged_ids() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and masks of seven prompts, then of their completions."""
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(TestFittedPass.lengths, TestFittedPass.width)
    parts = []
    for side in ("prompt", "completion"):
        mask = batch[f"{side}_mask"]
        parts.append((torch.randint(4, 24, mask.shape, generator=generator) * mask, mask))
    return parts


# Gradients of what can't be run here: vLLM's ratios, advantages by token


def gradient(trainer: Any, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
    trainer.model.zero_grad()
    for batch in micro_batches:
        trainer.compute_loss(trainer.model, batch).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def by_token(batch: dict[str, Any], generator: torch.Generator, low: float, high: float) -> torch.Tensor:
    """Random values, 1 in padding as TRL's ratio is."""
    values = torch.rand(batch["completion_ids"].shape, generator=generator) * (high - low) + low
    return torch.where(batch["completion_mask"].bool(), values, 1.0)


def token_ratio(batch: dict[str, Any], generator: torch.Generator) -> None:
    batch["importance_sampling_ratio"] = by_token(batch, generator, 0.8, 1.25)


def masked_token_ratio(batch: dict[str, Any], generator: torch.Generator) -> None:
    ratio = by_token(batch, generator, 0.8, 1.25)
    batch["importance_sampling_ratio"] = ratio.masked_fill(ratio > 1.2, 0.0)


def sequence_ratio(batch: dict[str, Any], generator: torch.Generator) -> None:
    batch["importance_sampling_ratio"] = torch.rand((len(batch["advantages"]), 1), generator=generator) + 0.5


def token_advantages(batch: dict[str, Any], generator: torch.Generator) -> None:
    """One row is dead; padding has advantages too, which don't matter."""
    batch["advantages"] = torch.randn(batch["completion_ids"].shape, generator=generator)
    batch["advantages"][0] = 0.0


def sampled_elsewhere(batch: dict[str, Any], generator: torch.Generator) -> None:
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"] * by_token(batch, generator, 0.7, 1.1)
    batch["sampling_per_token_logps"][0, 0] = torch.nan  # vLLM couldn't tell


VLLM = {"use_vllm": True, "vllm_importance_sampling_correction": True}
PERTURBED: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "token_ratio": (token_ratio, VLLM),
    "masked_token_ratio": (masked_token_ratio, VLLM),
    "sequence_ratio": (sequence_ratio, VLLM),
    "token_advantages": (token_advantages, {}),
    "off_policy_mask": (sampled_elsewhere, {"off_policy_mask_threshold": 0.3}),
}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """For each loss a trainer, and micro-batches with old log-probabilities as of another policy."""
    made: dict[str, Any] = {}

    def get(loss_type: str) -> tuple[Any, list[dict[str, Any]]]:
        if loss_type not in made:
            trainer = tiny.trainer(
                trl_ext.GRPOTrainer,
                tmp_path_factory.mktemp(loss_type),
                tiny.LiveFor({target for target in range(4, 24) if target % 3}),
                {"train_dataset": tiny.ragged()},
                loss_type=loss_type,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,
                updates_per_generation=2,
                max_completion_length=12,
            )
            made[loss_type] = trainer, preview_micro_batches(trainer)[:4]
            trainer.current_gradient_accumulation_steps = 4
            assert len(made[loss_type][1]) == 4
        trainer, dealt = made[loss_type]
        generator = torch.Generator().manual_seed(1)
        batches = [dict(batch) for batch in dealt]
        for batch in batches:
            noise = torch.randn(batch["old_per_token_logps"].shape, generator=generator) / 10
            batch["old_per_token_logps"] = batch["old_per_token_logps"] + noise * batch["completion_mask"]
        return trainer, batches

    return get


@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "grpo", "cispo"])
@pytest.mark.parametrize("name", PERTURBED)
def test_the_gradient_stays(name, loss_type, rollouts, monkeypatch):
    perturb, attributes = PERTURBED[name]
    trainer, batches = rollouts(loss_type)
    plain = gradient(trainer, batches)
    for attribute, value in attributes.items():
        monkeypatch.setattr(trainer, attribute, value)
    generator = torch.Generator().manual_seed(2)
    for batch in batches:
        perturb(batch, generator)
    theirs, saved = gradient(trainer, batches), SavedCompute()
    fitted = trainer.fit(batches, [(0, 4)], saved)
    assert saved.skipped_rows and saved.regrouped_rows and saved.token_slots < saved.token_slots_trl
    assert relative_error(gradient(trainer, fitted), theirs) <= 1e-5
    assert relative_error(plain, theirs) > 1e-2  # what was changed matters


@pytest.mark.parametrize("name", ["token_advantages", "sequence_ratio"])
@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "grpo"])
def test_copies_of_a_row_are_its_weight(name, loss_type, rollouts, monkeypatch):
    """The last micro-batch repeats the first: 16 rows, 12 of them different."""
    perturb, attributes = PERTURBED[name]
    trainer, batches = rollouts(loss_type)
    for attribute, value in {**attributes, "exact_savings": EVERYTHING}.items():
        monkeypatch.setattr(trainer, attribute, value)
    generator = torch.Generator().manual_seed(2)
    for batch in batches:
        perturb(batch, generator)
    batches[3] = dict(batches[0])
    for i, batch in enumerate(batches):
        batch[SOURCE_ROW] = torch.arange(4) + 4 * (i % 3)
    saved = SavedCompute()
    fitted = trainer.fit(batches, [(0, 4)], saved)
    assert saved.merged_rows > 0
    assert relative_error(gradient(trainer, fitted), gradient(trainer, batches)) <= 1e-5


def test_an_environments_unlikely_tokens_do_not_spoil_rows_without_weight(rollouts):
    """A log-probability of −200 makes a ratio of infinity where a row stands in for nothing."""
    trainer, batches = rollouts("dapo")
    for batch in batches:
        batch["advantages"] = -batch["advantages"].abs() * 0
        batch["old_per_token_logps"] = torch.full_like(batch["old_per_token_logps"], -200.0)
    batches[0]["advantages"] = torch.tensor([-1.0, 0.0, 0.0, 0.0])
    fitted = trainer.fit(batches, [(0, 4)], SavedCompute())
    assert sum(batch[FIT].fillers for batch in fitted) == 3
    for batch in fitted[1:]:
        assert trainer.compute_loss(trainer.model, batch) == 0
        assert not gradient(trainer, [batch]).any()
