"""
What is said of padding and of shared prompts, against the outputs of all architectures of transformers that can be
built tiny.
"""

from typing import Any

import architectures
import pytest
import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from trl_ext.rollouts.exactness import fewest_rows, has_relative_positions, needs_full_width
from trl_ext.rollouts.prefix_exactness import attention_window, sharing_obstacles
from trl_ext.rollouts.prefix_trees import Cost
from trl_ext.rollouts.shared_pass import SharedPass, Sharing


TOLERANCE = 1e-4
# Columns of a batch, and columns of padding to add to it. Rotary embeddings that depend on the width change at
# `architectures.SHORT` columns.
NARROW, WIDE = (7, 4), (18, 7)
# Of about 190 architectures. The others are parts of models that read images, audio or another language first.
FEWEST_BUILT = 140


def log_probabilities(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float().log_softmax(-1)


def rows(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, two of which have left padding."""
    ids = torch.randint(4, 24, (3, columns), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 3), (2, 1)):
        ids[row, :padding] = mask[row, :padding] = 0
    return ids, mask


def moved(model: Any, columns: int, left: int = 0, right: int = 0) -> float:
    """How far log-probabilities move when padding is added."""
    ids, mask = rows(columns)
    padded = [nn.functional.pad(tensor, (left, right)) for tensor in (ids, mask)]
    after = log_probabilities(model, *padded)[:, left : left + columns]
    return (after - log_probabilities(model, ids, mask))[mask.bool()].abs().max().item()


def moved_alone(model: Any, columns: int) -> float:
    """How far log-probabilities move when a row is alone in its batch."""
    ids, mask = rows(columns)
    together = log_probabilities(model, ids, mask)
    alone = torch.cat([log_probabilities(model, ids[i : i + 1], mask[i : i + 1]) for i in range(len(ids))])
    return (alone - together)[mask.bool()].abs().max().item()


def moved_by_sharing(model: Any, columns: int) -> float:
    """How far log-probabilities move when rows that begin with the same tokens share them."""
    implementation = model.config._attn_implementation
    if sharing_obstacles(model, implementation):
        return 0.0
    ids = torch.randint(4, 24, (3, columns), generator=torch.Generator().manual_seed(0))
    ids[1:, : columns // 2] = ids[0, : columns // 2]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}
    add_fused_lm_head(model)
    window = attention_window(model)
    sharing = Sharing(Cost(0.0), attention=implementation, always=True, window=window)
    with torch.no_grad():
        alone, shared = model(**inputs).log_probs, SharedPass(model, sharing, model)(**inputs).log_probs
    assert sharing.packed_passes == (window is None or window.masks is not None)
    return (shared - alone).abs().max().item()


def wrong(model: Any) -> list[str]:
    """What is said of a model and isn't true."""
    full_width, found = needs_full_width(model), []
    for columns, more in (NARROW, WIDE):
        if full_width is not None and full_width.columns <= columns + more:
            continue
        if not moved(model, columns, right=more) <= TOLERANCE:
            found.append(f"right padding moves {columns} columns")
        if has_relative_positions(model) and not moved(model, columns, left=more) <= TOLERANCE:
            found.append(f"left padding moves {columns} columns")
        if fewest_rows(model) == 1 and not moved_alone(model, columns) <= TOLERANCE:
            found.append(f"{columns} columns are moved by other rows")
    # Beyond the tiny windows, within the width that the angles of rotary embeddings depend on
    if not moved_by_sharing(model, architectures.SHORT - 1) <= TOLERANCE:
        found.append("sharing moves them")
    return found


@pytest.mark.slow
def test_what_is_said_of_every_architecture_is_true(subtests):
    not_built = {}
    for name in architectures.names():
        try:
            model = architectures.model(name)
            log_probabilities(model, *rows(NARROW[0]))
        except Exception as error:  # whatever a configuration says of a shape that it can't have
            not_built[name] = f"{type(error).__name__}: {error}"
            continue
        with subtests.test(name=name):
            assert wrong(model) == []
    assert len(architectures.names()) - len(not_built) >= FEWEST_BUILT, not_built
    assert not not_built.keys() & {*architectures.SETTINGS, *architectures.VARIANTS}


@pytest.mark.parametrize("name", architectures.WIDTH_DEPENDENT)
def test_rotary_embeddings_that_depend_on_the_width(name):
    """Below their limit nothing moves, and beyond it everything does."""
    model = architectures.model(name)
    full_width = needs_full_width(model)
    assert full_width is not None and full_width.columns == architectures.SHORT
    assert wrong(model) == []
    assert moved(model, architectures.SHORT - 1, right=4) > 1e-2
    assert moved(model, architectures.SHORT - 1, left=4) > 1e-2


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "hunyuan_v1_moe", "beam"])
def test_positions_that_a_configuration_does_not_show_to_be_absolute(name):
    model = architectures.model(name)
    assert not has_relative_positions(model)
    assert moved(model, *WIDE[:1], left=WIDE[1]) > TOLERANCE


@pytest.mark.parametrize("name", ["cpmant", "prophetnet"])
def test_architectures_that_see_padding_on_the_right(name):
    model = architectures.model(name)
    full_width = needs_full_width(model)
    assert full_width is not None and full_width.columns == 0
    assert moved(model, WIDE[0], right=WIDE[1]) > TOLERANCE
