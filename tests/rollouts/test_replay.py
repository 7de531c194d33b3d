"""Rows of earlier generation batches: what is kept, drawn, and joined to new ones."""

from typing import Any

import torch

from trl_ext.rollouts.replay import ReplayBuffer, append_rows


def micro_batch(first: int, rows: int, prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    """Tensors whose every entry says from which row it is; prompts are padded on the left."""
    numbers = torch.arange(first, first + rows).unsqueeze(1)
    lengths = 1 + torch.arange(rows).unsqueeze(1) % completion
    mask = (torch.arange(completion) < lengths).long()
    return {
        "prompt_ids": numbers.expand(rows, prompt).clone(),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": numbers * mask,
        "completion_mask": mask,
        "old_per_token_logps": -0.1 * numbers * mask,
        "importance_sampling_ratio": torch.where(mask.bool(), 0.5, 1.0),
        "advantages": numbers * mask.float(),
        "is_right": torch.ones(rows),
        "num_items_in_batch": torch.tensor(100),
        **more,
    }


def names(rows: list[dict[str, Any]]) -> list[int]:
    return [int(row["prompt_ids"][0, -1]) for row in rows]


def test_a_draw_is_of_different_rows_with_everything_that_is_theirs():
    buffer = ReplayBuffer(capacity=2, seed=0)
    buffer.add([micro_batch(10, 3, 2, 4), micro_batch(13, 3, 2, 4)])
    assert len(buffer) == 6
    rows = buffer.draw(6)
    assert sorted(names(rows)) == [10, 11, 12, 13, 14, 15]
    for row, name in zip(rows, names(rows), strict=True):
        assert all(value.size(0) == 1 for value in row.values())
        assert "num_items_in_batch" not in row
        written = row["completion_mask"].bool()
        assert (row["completion_ids"][written] == name).all()
        torch.testing.assert_close(row["old_per_token_logps"][written], torch.full((int(written.sum()),), -0.1 * name))
        assert (row["advantages"][written] == name).all()


def test_the_oldest_batch_leaves():
    buffer = ReplayBuffer(capacity=2, seed=0)
    for first in (0, 10, 20):
        buffer.add([micro_batch(first, 2, 1, 3)])
    assert sorted(names(buffer.draw(4))) == [10, 11, 20, 21]


def test_rows_of_batches_of_different_width():
    buffer = ReplayBuffer(capacity=2, seed=0)
    buffer.add([micro_batch(0, 2, 1, 3)])
    buffer.add([micro_batch(10, 2, 5, 7)])
    rows = buffer.draw(4)
    widths = {name: row["completion_ids"].size(1) for row, name in zip(rows, names(rows), strict=True)}
    assert widths == {0: 3, 1: 3, 10: 7, 11: 7}


def test_every_row_comes_as_often():
    buffer, counts = ReplayBuffer(capacity=3, seed=0), dict.fromkeys(range(12), 0)
    for first in (0, 4, 8):
        buffer.add([micro_batch(first, 4, 1, 2)])
    for _ in range(600):
        for name in names(buffer.draw(3)):
            counts[name] += 1
    assert all(100 < count < 200 for count in counts.values())  # 150 expected


def test_draws_depend_on_the_seed_and_go_on_from_a_state():
    def filled(seed: int) -> ReplayBuffer:
        buffer = ReplayBuffer(capacity=2, seed=seed)
        buffer.add([micro_batch(0, 8, 1, 3)])
        return buffer

    one, same, other = filled(1), filled(1), filled(2)
    first = names(one.draw(5))
    assert first == names(same.draw(5)) != names(other.draw(5))
    resumed = ReplayBuffer(capacity=2, seed=9)
    resumed.load_state_dict(one.state_dict())
    assert [names(one.draw(5)) for _ in range(3)] == [names(resumed.draw(5)) for _ in range(3)]


def test_what_is_kept_does_not_change_with_the_batch_it_came_from():
    buffer, batch = ReplayBuffer(capacity=1, seed=0), micro_batch(3, 2, 1, 2)
    buffer.add([batch])
    batch["advantages"].zero_()
    assert buffer.draw(2)[0]["advantages"].any()


# Joined to new rows


def test_rows_are_padded_to_the_widest(subtests):
    for prompt, completion in [(1, 2), (5, 2), (1, 9), (5, 9), (3, 4)]:
        with subtests.test(prompt=prompt, completion=completion):
            batch, old = micro_batch(10, 3, 3, 4), micro_batch(20, 2, prompt, completion)
            buffer = ReplayBuffer(capacity=1, seed=0)
            buffer.add([old])
            joined = append_rows(batch, buffer.draw(2))
            wide = max(prompt, 3), max(completion, 4)
            assert joined["prompt_ids"].shape == joined["prompt_mask"].shape == (5, wide[0])
            assert joined["completion_ids"].shape == joined["advantages"].shape == (5, wide[1])
            assert joined["is_right"].shape == (5,)
            assert joined["num_items_in_batch"] == 100
            # Every row is what it was, behind its masks, and says where it came from
            found = {}
            for row in range(5):
                name = int(joined["prompt_ids"][row, -1])
                shown, written = joined["prompt_mask"][row].bool(), joined["completion_mask"][row].bool()
                assert shown[-1] and not (shown[1:] < shown[:-1]).any()  # padding stands on the left
                assert (joined["prompt_ids"][row, shown] == name).all()
                assert (joined["completion_ids"][row, written] == name).all()
                assert not joined["advantages"][row, ~written].any()
                found[name] = int(shown.sum()), int(written.sum())
            assert found == {10: (3, 1), 11: (3, 2), 12: (3, 3), 20: (prompt, 1), 21: (prompt, min(2, completion))}
            # TRL has a ratio of 1 in padding
            assert (joined["importance_sampling_ratio"][joined["completion_mask"] == 0] == 1).all()
            # and the micro-batch itself is left alone
            assert batch["completion_ids"].shape == (3, 4)


def test_a_mask_that_only_some_rows_have_means_everything_for_the_others():
    # An environment wrote in one generation batch, and in the other it didn't
    tools = {"tool_mask": torch.tensor([[1, 0, 1, 1], [1, 0, 1, 1]])}
    for new, old in ((tools, {}), ({}, tools)):
        buffer = ReplayBuffer(capacity=1, seed=0)
        buffer.add([micro_batch(20, 2, 1, 4, **old)])
        joined = append_rows(micro_batch(10, 2, 1, 4, **new), buffer.draw(2))
        rows = {int(name): mask.tolist() for name, mask in zip(joined["prompt_ids"], joined["tool_mask"], strict=True)}
        masked, whole = ((10, 11), (20, 21)) if new else ((20, 21), (10, 11))
        assert all(rows[name] == [1, 0, 1, 1] for name in masked)
        assert all(rows[name] == [1, 1, 1, 1] for name in whole)


def test_copies_are_told_apart_from_rows_that_are_none():
    # Only a batch with copies says of its rows what they are copies of
    copies = {"source_row": torch.tensor([5, 5])}
    for new, old in ((copies, {}), ({}, copies), (copies, copies)):
        buffer = ReplayBuffer(capacity=1, seed=0)
        buffer.add([micro_batch(20, 2, 1, 4, **old)])
        joined = append_rows(micro_batch(10, 2, 1, 4, **new), buffer.draw(2))
        assert len(joined["completion_ids"]) == 4
        sources = joined.get("source_row")
        # A row of the past is no copy of one of the present
        assert sources is None or sources.tolist() == [5, 5, -1, -1]


# Resumed on a different number of processes


def test_other_processes_share_the_rows_evenly():
    states = []
    for process in range(2):  # the second process has wider rows
        buffer = ReplayBuffer(capacity=2, seed=3)
        for batch in range(3):
            buffer.add([micro_batch(100 * batch + 10 * process, 4, 2 + process, 3 + 2 * process)])
        buffer.draw(1)
        states.append(buffer.state_dict())
    for processes in (1, 3, 4):
        shares = []
        for index in range(processes):
            share = ReplayBuffer(capacity=2, seed=9)
            share.load_share(states, index, processes)
            shares.append(share)
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) == 2 * (8 // processes)
        drawn = [names(share.draw(len(share))) for share in shares]
        kept = [name for rows in drawn for name in rows]
        everything = {100 * batch + 10 * process + row for batch in (1, 2) for process in (0, 1) for row in range(4)}
        assert len(kept) == len(set(kept)) and set(kept) <= everything
    # The next draw is that of the first run
    again = ReplayBuffer(capacity=2, seed=0)
    again.load_state_dict(states[0])
    share = ReplayBuffer(capacity=2, seed=9)
    share.load_share(states, 0, 2)
    assert torch.equal(share.generator.get_state(), again.generator.get_state())


def test_fewer_rows_than_processes_are_dropped():
    buffer = ReplayBuffer(capacity=2, seed=0)
    buffer.add([micro_batch(0, 2, 1, 3)])
    share = ReplayBuffer(capacity=2, seed=0)
    share.load_share([buffer.state_dict()], 0, 3)
    assert len(share) == 0 and share.draw(2) == []
