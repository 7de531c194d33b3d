"""What `--help` of a recipe shows, in which order."""

from dataclasses import fields

import pytest
import trl

import trl_ext
from trl_ext.run.arguments import PolicyArguments, PPOArguments, parse_arguments
from trl_ext.run.parsing import in_sections


def shown(capsys: pytest.CaptureFixture[str], script: type, config: type) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(script, config, ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_recipes_arguments_and_the_methods_come_before_trls(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, PPOArguments, trl_ext.VAPOConfig)
    order = [
        "usage: ",
        "this recipe:",
        "--value_model_name_or_path",
        "--held_out_prompts",
        "VAPOConfig of trl_ext:",
        "--lam_alpha",
        "PPOConfig of trl_ext:",
        "--vf_coef",
        "GRPOConfig of trl_ext:",
        "--rollout_selection",
        "TRL:",
        "--max_completion_length",
        "--lora_r",
        "transformers:",
        "--weight_decay",
    ]
    places = [text.index(f"\n  {word} " if word.startswith("--") else word) for word in order]
    assert places == sorted(places)
    assert "(default: 0.05)" in text  # VAPO's alpha
    assert len(text.split("this recipe:")[0].splitlines()) < 8, "a usage of every argument"


def test_every_argument_is_in_one_section() -> None:
    for kinds in ([PolicyArguments, trl_ext.DAPOConfig, trl.ModelConfig], [PPOArguments, trl.SFTConfig]):
        named = [name for names in in_sections(kinds).values() for name in names]
        assert len(named) == len(set(named))
        assert set(named) == {entry.name for kind in kinds for entry in fields(kind) if entry.init}


def test_trls_own_trainers_have_no_section_of_ours() -> None:
    assert list(in_sections([PolicyArguments, trl.SFTConfig])) == ["this recipe", "TRL", "transformers"]
    assert list(in_sections([trl.SFTConfig])) == ["TRL", "transformers"]
