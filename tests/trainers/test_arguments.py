"""Arguments of trainers: bound by TRL's names, with a configuration of ours, and without changing the caller's."""

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import trl
from peft import LoraConfig

import trl_ext
from trl_ext.trainers.arguments import adopted, bound, model_name


class Trainer:
    config_class = trl_ext.DPOConfig
    _name = "DPO"


def config(folder: Any, **settings: Any) -> trl_ext.DPOConfig:
    return trl_ext.DPOConfig(**tiny.pair_settings(folder, **settings))


def test_positional_arguments_get_their_names(tmp_path):
    rows = tiny.prompts(2)
    given = bound(trl.DPOTrainer, Trainer(), ("model", None, config(tmp_path)), {"train_dataset": rows})
    assert list(given) == ["model", "ref_model", "args", "train_dataset"]
    assert (given["model"], given["ref_model"]) == ("model", None) and given["train_dataset"] is rows


def test_an_unknown_argument_is_refused(tmp_path):
    with pytest.raises(TypeError, match="rubbish"):
        bound(trl.DPOTrainer, Trainer(), ("model",), {"args": config(tmp_path), "rubbish": 1})


def test_a_configuration_of_trls_becomes_ours(tmp_path):
    theirs = trl.DPOConfig(**tiny.pair_settings(tmp_path, beta=0.3))
    given = bound(trl.DPOTrainer, Trainer(), ("model",), {"args": theirs})
    assert type(given["args"]) is trl_ext.DPOConfig and given["args"].beta == 0.3
    with pytest.raises(TypeError, match=r"must be a DPOConfig or a trl\.DPOConfig, not SimpleNamespace"):
        bound(trl.DPOTrainer, Trainer(), ("model",), {"args": SimpleNamespace()})


def test_what_is_written_into_the_configuration_is_not_written_into_the_callers(tmp_path):
    mine = config(tmp_path)
    before = dict(vars(mine))
    given = bound(trl.DPOTrainer, Trainer(), ("model",), {"args": mine})
    given["args"].beta = 17.0
    assert vars(mine) == before and mine.beta != 17.0


def test_a_peft_config_stays_as_it_was(tmp_path):
    """PEFT writes the modules that it found and the model's name into the one that it gets."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    before = copy.deepcopy(lora.to_dict())
    rows = tiny.prompts(4).map(lambda row: {"chosen": "w1", "rejected": "w2"})
    trainer = trl_ext.DPOTrainer(
        tiny.qwen2(), args=config(tmp_path), train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=lora
    )
    assert lora.to_dict() == before
    assert trainer.model.peft_config["default"].target_modules != "all-linear"


@dataclass
class Mine(trl.DPOConfig):
    remembered: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta = self.beta / 2
        self.counted = len(self.remembered)

    @property
    def twice(self) -> int:
        return 2 * self.counted

    def says(self, word: str) -> str:
        return f"{word} {self.remembered}"


def test_adopting_keeps_what_a_users_own_class_is(tmp_path):
    mine = Mine(**tiny.pair_settings(tmp_path, beta=0.4), remembered=[3, 4])
    ours = adopted(trl_ext.DPOConfig, mine, trl.DPOConfig)
    assert isinstance(ours, trl_ext.DPOConfig) and isinstance(ours, Mine) and type(mine) is Mine
    assert (ours.remembered, ours.counted, ours.twice, ours.says("all of")) == ([3, 4], 2, 4, "all of [3, 4]")
    assert ours.beta == mine.beta == 0.2  # what its `__post_init__` did isn't done again
    assert {**ours.to_dict(), **mine.to_dict()} == ours.to_dict()
    assert adopted(trl_ext.DPOConfig, ours, trl.DPOConfig) is ours


@pytest.mark.parametrize("config_class", [trl_ext.GRPOConfig, trl_ext.DAPOConfig, trl_ext.PPOConfig])
def test_a_users_own_class_keeps_the_methods_defaults(config_class, tmp_path):
    @dataclass
    class Plain(trl.GRPOConfig):
        note: str = ""

        def shout(self) -> str:
            return self.note.upper()

    ours = config_class.adopt(Plain(**tiny.cpu_settings(tmp_path), note="hm"))
    expected = config_class.adopt(trl.GRPOConfig(**tiny.cpu_settings(tmp_path)))
    assert ours.shout() == "HM"
    assert {name: value for name, value in ours.to_dict().items() if name != "note"} == expected.to_dict()


def test_a_users_own_class_survives_copies_and_files(tmp_path):
    ours = trl_ext.DPOConfig.adopt(Mine(**tiny.pair_settings(tmp_path), remembered=[3]))
    torch.save(ours, tmp_path / "training_args.bin")
    for other in (
        copy.copy(ours),
        copy.deepcopy(ours),
        torch.load(tmp_path / "training_args.bin", weights_only=False),
    ):
        assert type(other) is type(ours) and other is not ours
        assert other.to_dict() == ours.to_dict() and other.twice == 2


def test_adopting_takes_what_it_is_told_to(tmp_path):
    theirs = trl.DPOConfig(**tiny.pair_settings(tmp_path, beta=0.4))
    settings = tiny.pair_settings(tmp_path, seed=5)
    ours = adopted(trl_ext.DPOConfig, theirs, trl.DPOConfig, taken=lambda args: {**settings, "beta": args.beta / 2})
    assert (ours.beta, ours.seed) == (0.2, 5)


def test_the_name_of_a_model():
    assert model_name("org/a-model") == model_name("/folder/a-model") == "a-model"
    model = tiny.qwen2()
    model.config._name_or_path = "org/another"
    assert model_name(model) == "another"
