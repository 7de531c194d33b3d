"""One set of weights in several models, and adapters in files."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from trl_ext.roles.trunk import load_adapter, save_adapter, sharing_weights


def adapted(seed: int = 0, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(tiny.qwen2(), tiny.lora(**settings))


def test_modules_of_its_own_around_the_same_weights() -> None:
    model = adapted()
    copied = sharing_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    copied.add_adapter("ref", copied.peft_config["default"])
    copied.get_base_model().forward = None
    assert list(model.peft_config) == ["default"] and "forward" not in model.get_base_model().__dict__


@pytest.mark.parametrize("name", ["default", "ref"])
def test_an_adapter_is_loaded_under_any_name(name: str, tmp_path: Path) -> None:
    saved, model = adapted(1), adapted(2)
    model.add_adapter("ref", model.peft_config["default"])
    before, own = tiny.weights(model), tiny.weights(saved)
    save_adapter(saved, tmp_path)
    load_adapter(model, tmp_path, name)
    for key, weight in model.state_dict().items():
        loaded = f".{name}." in key
        assert torch.equal(weight, own[key.replace(f".{name}.", ".default.")] if loaded else before[key]), key


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (["q_proj"], ["q_proj", "v_proj"], "4 of its weights are missing, 0 are unknown"),
        (["q_proj", "v_proj"], ["q_proj"], r"0 of its weights are missing, 4 are unknown \(such as '.*v_proj.*'\)"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(saved: Any, loaded: Any, message: str, tmp_path: Path) -> None:
    save_adapter(adapted(target_modules=saved), tmp_path)
    with pytest.raises(ValueError, match=f"not of this shape: {message}"):
        load_adapter(adapted(target_modules=loaded), tmp_path)
