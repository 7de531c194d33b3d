"""A pass that shares prompts gives what the model gives: log-probabilities, entropies, values and gradients."""

from typing import Any

import architectures
import pytest
import tiny
import torch
from trl.trainer.utils import add_fused_lm_head

from trl_ext.rollouts import shared_pass
from trl_ext.rollouts.kept_states import KeptStates
from trl_ext.rollouts.prefix_exactness import Window, attention_window
from trl_ext.rollouts.prefix_trees import Cost, packed_rows
from trl_ext.rollouts.shared_pass import SharedPass, Sharing, attention_mask


PROMPT, COMPLETION = 12, 9


def model_with_head(implementation: str = "sdpa", **settings: Any) -> Any:
    return with_head(tiny.qwen2(num_key_value_heads=1, **settings), implementation)


def with_head(model: Any, implementation: str) -> Any:
    model.set_attn_implementation(implementation)
    add_fused_lm_head(model, 1.0, False, ("log_probs", "entropy"))
    return model.train()


def batch() -> dict[str, Any]:
    """
    Three prompts with four completions each, some of them empty or of one token, a prompt of one token, and three rows
    that share the beginning of their completion too. Prompts are padded on the left, completions on the right.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(size: int) -> torch.Tensor:
        return torch.randint(4, 24, (size,), generator=generator)

    rows = []
    for size in (3, 7, PROMPT):
        prompt = ids(size)
        rows += [(prompt, ids(length)) for length in (0, 1, 5, COMPLETION)]
    rows.append((ids(1), ids(4)))
    prompt, turn = ids(10), ids(6)
    rows += [(prompt, torch.cat([turn, ids(length)])) for length in range(3)]
    input_ids = torch.zeros(len(rows), PROMPT + COMPLETION, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, (prompt, completion) in enumerate(rows):
        where = slice(PROMPT - len(prompt), PROMPT + len(completion))
        input_ids[i, where], mask[i, where] = torch.cat([prompt, completion]), 1
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}


SHARED: dict[str, dict[str, Any]] = {
    "packed": {"cost": Cost(0.0)},
    "packed in several rows": {"cost": Cost(0.02)},
    "cached": {"cost": Cost(0.0), "pack": False, "cache": True},
}


def sharing_as(how: str, attention: str = "sdpa") -> Sharing:
    return Sharing(**SHARED[how], attention=attention, always=True)


def found(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Log-probabilities and entropies of completions, and the gradient of a weighted sum of the former."""
    output = model(**inputs)
    logps, entropy = output.log_probs[:, -COMPLETION:], output.entropy[:, -COMPLETION:]
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(getattr(model, "base", model).parameters())
    gradient = torch.autograd.grad((logps * weights).sum(), parameters)
    return [logps, entropy, torch.cat([part.flatten() for part in gradient])]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", SHARED)
def test_numbers_and_gradients_are_the_models(how, implementation):
    model, inputs = model_with_head(implementation), batch()
    if how == "cached":  # a prompt of one token leaves nothing to keep
        inputs = {k: v[torch.arange(16) != 12] if k != "fused_lm_head" else v for k, v in inputs.items()}
    sharing = sharing_as(how, implementation)
    ours = found(SharedPass(model, sharing, model, COMPLETION), inputs)
    assert (sharing.packed_passes, sharing.cached_passes) == ((0, 1) if how == "cached" else (1, 0))
    for mine, theirs in zip(ours, found(model, inputs), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    "name, masks, implementation",
    [
        ("qwen2_sliding", "by_layer_type", "sdpa"),
        ("gemma2", "by_layer_type", "eager"),
        ("mistral_sliding", "one", "sdpa"),
    ],
)
def test_windows_shorter_than_a_row(name, masks, implementation):
    """Numbers and gradients are the model's, and they depend on the window."""
    model, inputs = with_head(architectures.model(name), implementation), batch()
    window = attention_window(model)
    assert window.masks == masks and window.tokens < PROMPT
    sharing = Sharing(Cost(0.0), attention=implementation, always=True, window=window)
    mine, theirs = found(SharedPass(model, sharing, model, COMPLETION), inputs), found(model, inputs)
    assert sharing.packed_passes == 1
    sharing.window = None
    without = found(SharedPass(model, sharing, model, COMPLETION), inputs)
    for ours, windowless, given in zip(mine, without, theirs, strict=True):
        assert (ours - given).norm() <= 1e-5 * given.norm() < (windowless - given).norm()


@pytest.mark.slow
def test_the_mask_of_flex_attention_is_the_dense_one():
    """With a window. Forward only: on a CPU, FlexAttention has no backward."""
    outputs = []
    for implementation in ("flex_attention", "sdpa"):
        model = model_with_head(implementation, use_sliding_window=True, sliding_window=4, max_window_layers=0)
        sharing = sharing_as("packed", implementation)
        sharing.window = attention_window(model)
        with torch.no_grad():
            outputs.append(SharedPass(model, sharing, model, COMPLETION)(**batch()).log_probs)
        assert sharing.packed_passes == 1
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("window", [None, 3])
def test_block_mask_and_dense_mask_place_by_place(window):
    inputs = batch()
    rows = [row[kept] for row, kept in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]
    packed = packed_rows(rows, Cost(0.02), fewest=2)
    block = attention_mask(packed, "flex_attention", torch.float32, torch.device("cpu"), window)
    dense = attention_mask(packed, "sdpa", torch.float32, torch.device("cpu"), window)
    looks, seen = torch.meshgrid(torch.arange(packed.width), torch.arange(packed.width), indexing="ij")
    for row in range(len(packed.segments)):
        of_block = block.mask_mod(torch.tensor(row), torch.tensor(0), looks, seen)
        assert torch.equal(of_block, dense[row, 0])


def test_labels_anywhere():
    """As in DPO: rows padded on the right, prompts of different lengths."""
    model, inputs = model_with_head(), batch()
    order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    moved = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask", "labels")}
    moved |= {"fused_lm_head": True, "use_cache": False}
    sharing = Sharing(Cost(0.0), always=True)
    mine, theirs = SharedPass(model, sharing, model)(**moved), model(**moved)
    assert sharing.packed_passes == 1
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(mine[name], theirs[name])


@pytest.mark.parametrize(
    "reason, more",
    [
        ("images", {"pixel_values": torch.zeros(1)}),
        ("a row without a token", {"attention_mask": batch()["attention_mask"] * (torch.arange(16) > 0)[:, None]}),
    ],
)
def test_what_is_not_understood_goes_to_the_model_as_it_is(reason, more):
    given: dict[str, Any] = {}

    def model(**inputs: Any) -> None:
        given.update(inputs)

    base = model_with_head()
    SharedPass(model, sharing_as("packed"), base, None)(**batch() | more)
    assert given["input_ids"].shape == (16, PROMPT + COMPLETION)


@pytest.mark.parametrize(
    "limits", [{"window": Window(PROMPT + COMPLETION - 1)}, {"full_width_from": PROMPT + COMPLETION}]
)
def test_rows_too_long_for_a_layer_are_not_shared(limits):
    model, sharing = model_with_head(), Sharing(Cost(0.0), always=True, **limits)
    SharedPass(model, sharing, model, COMPLETION)(**batch())
    assert sharing.passes == 1 and sharing.packed_passes == 0
    assert sharing.token_slots == sharing.token_slots_unshared
    assert sharing.any_length == ("window" not in limits)


@pytest.mark.parametrize("how, packed_passes", [("packed", 0), ("packed in several rows", 1)])
def test_a_mask_may_be_as_large_as_that_of_the_padded_rows(how, packed_passes, monkeypatch):
    """One packed row has a larger mask than 16 rows of 21 columns, several short ones a smaller one."""
    monkeypatch.setattr(shared_pass, "MASK_BUDGET", 0)
    model, sharing = model_with_head(), sharing_as(how)
    SharedPass(model, sharing, model, COMPLETION)(**batch())
    assert sharing.packed_passes == packed_passes


def test_what_costs_more_is_not_shared():
    """Attention over packed rows would cost more than the prompts that it saves."""
    model, inputs = model_with_head(), batch()
    longest = torch.tensor([11, 11])
    inputs = {name: value[longest] if name != "fused_lm_head" else value for name, value in inputs.items()}
    inputs["input_ids"][1, PROMPT:] = inputs["input_ids"][0, PROMPT:].flip(0)
    for pair, passes in ((0.0, 1), (100.0, 0)):
        sharing = Sharing(Cost(pair))
        SharedPass(model, sharing, model, COMPLETION)(**inputs)
        assert sharing.packed_passes == passes


def test_a_pass_that_fails_leaves_nothing_behind():
    model, inputs = model_with_head(), batch()
    broken = model.base_model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SharedPass(model, sharing_as("packed"), model, COMPLETION)(**inputs)
    broken.remove()
    assert model(**inputs).log_probs.shape == (16, PROMPT + COMPLETION - 1)


def test_only_states_that_are_asked_for_are_kept():
    model, inputs = model_with_head(), batch()
    sizes: list[int] = []
    assert KeptStates.of(model) is KeptStates.of(model)
    model.base_model.register_forward_hook(lambda module, args, output: sizes.append(output.last_hidden_state.size(1)))
    SharedPass(model, Sharing(Cost(0.0), pack=False), model, COMPLETION)(**inputs)
    SharedPass(model, Sharing(Cost(0.0), always=True), model, COMPLETION)(**inputs)
    # All completion columns and the one before; then one state for each token of a completion and for each prompt
    assert sizes == [COMPLETION + 1, int(inputs["attention_mask"][:, PROMPT:].sum()) + 16]
