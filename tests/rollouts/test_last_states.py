"""The states after one token of each row, with and without shared prompts, against one row at a time."""

import pytest
import tiny
import torch
from peft import get_peft_model

from trl_ext.rollouts.last_states import batches_of, last_states, sharing_for
from trl_ext.rollouts.prefix_trees import Cost
from trl_ext.rollouts.shared_pass import Sharing


ROWS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11], [5, 6, 7, 8, 9, 12, 13, 14], [4], [4, 5]]
LAST = [5, 3, 7, 0, 1]


def found(model, sharing):
    return last_states(model, model, [torch.tensor(row) for row in ROWS], LAST, sharing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("share", [True, False])
def test_states_are_those_of_each_row_alone(attention, share):
    model = tiny.qwen2(attn_implementation=attention).eval()
    sharing = sharing_for(model, attention, always=True, multiple=4) if share else Sharing(Cost(0.0), pack=False)
    with torch.no_grad():
        alone = [model.base_model(torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    wanted = torch.stack([states[at] for states, at in zip(alone, LAST, strict=True)])
    torch.testing.assert_close(found(model, sharing), wanted, rtol=1e-4, atol=1e-5)
    assert (sharing.passes, sharing.packed_passes) == (1, int(share))
    assert sharing.token_slots_unshared == 5 * 8
    assert sharing.token_slots == 5 * 8 if not share else sharing.token_slots < 24


def test_what_is_exact_without_dropout_may_be_shared():
    dropped = get_peft_model(tiny.qwen2(), tiny.lora(lora_dropout=0.3))
    assert sharing_for(dropped, "sdpa").pack
    assert not sharing_for(tiny.gpt2(), "sdpa").pack  # absolute positions


def test_how_many_batches_there_are_depends_on_the_number_of_rows_alone():
    sizes, prompts = [3, 9, 4, 2, 8], ["b", "a", "b", "c", "a"]
    assert batches_of(sizes, prompts, 2) == [[3, 0], [2, 4], [1]]  # by the longest row of a prompt
    assert len(batches_of([1] * 5, ["a"] * 5, 2)) == 3
