"""One policy in memory, whoever trains it, and nothing left of a trainer that is gone."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from pipelines.dpo_then_ppo_worker import policy_settings
from pipelines.runs import adapter, same, short
from torch import nn
from transformers import BitsAndBytesConfig

from trl_ext import PPOConfig
from trl_ext.roles.trunk import storages


@pytest.mark.train
def test_the_switch_holds_one_base(tmp_path: Path) -> None:
    """Every parameter that is alive while a stage begins: base and adapter once, and what the stage adds."""
    model = tiny.stopping()
    base = sum(storages(model.parameters()).values())
    sizes: dict[str, dict[str, int]] = {}

    def look(stage: str, trainer: Any) -> None:
        gc.collect()
        own = storages(p for name, p in trainer.model.named_parameters() if "lora" not in name)
        lora_ = storages(p for name, p in trainer.model.named_parameters() if "lora" in name)
        alive = [o for o in gc.get_objects() if isinstance(o, nn.Parameter)]
        like_base = [p for p in alive if p.shape == model.get_input_embeddings().weight.shape]
        sizes[stage] = {"own": sum(own.values()), "embeddings": len(storages(like_base)), "lora": len(lora_)}

    gc.collect()
    before = len(storages(o for o in gc.get_objects() if isinstance(o, nn.Parameter) and o.shape == (24, 16)))
    short(tmp_path, model=model, prepare=look, policy_args=PPOConfig(**policy_settings(max_steps=1))).train()
    critic = 16 * 4 + 4  # a linear head on 16 hidden units, in float32
    assert sizes["dpo"]["own"] == base
    assert sizes["ppo"]["own"] == base + critic
    assert sizes["dpo"]["embeddings"] == sizes["ppo"]["embeddings"] == before
    assert sizes["dpo"]["lora"] == 2 * sizes["ppo"]["lora"]  # DPO's reference, gone with it


def test_a_stage_doesnt_depend_on_what_ran_before(tmp_path: Path) -> None:
    """Not even where a trainer draws before it sets its seed, as a value model without a head does."""

    class Drawing:
        accelerator = SimpleNamespace(device="cpu")

        def __init__(self, model: Any) -> None:
            self.model, self.drawn = nn.Identity(), torch.rand(3).tolist()

    run, drawn = short(tmp_path), []
    for before in (1, 2):
        torch.manual_seed(before)
        drawn.append(run._policy.trainer(Drawing, seed=7).drawn)
    assert drawn[0] == drawn[1]
    # Nor on the type that generation, or an engine, left the weights in
    found = {name: weight.clone() for name, weight in run.policy.named_parameters() if "lora" in name}
    run.policy.to(torch.bfloat16)
    run._policy.trainer(Drawing, seed=7)
    assert same(found, {name: weight for name, weight in run.policy.named_parameters() if "lora" in name})


@pytest.mark.train
def test_a_quantized_base(tmp_path: Path) -> None:
    tiny.stopping().save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    run = short(
        tmp_path,
        model=str(tmp_path / "base"),
        model_init_kwargs={"quantization_config": quantized},
    )
    base = {name: weight.clone() for name, weight in run.policy.named_parameters() if not weight.requires_grad}
    assert "Params4bit" in {type(weight).__name__ for weight in run.policy.parameters()}
    run.train()
    assert all(torch.equal(base[name], weight) for name, weight in run.policy.named_parameters() if name in base)
    adapters = [adapter(tmp_path / folder) for folder in ("start", "round_1/dpo", "round_1/ppo")]
    assert not same(adapters[0], adapters[1]) and not same(adapters[1], adapters[2])
