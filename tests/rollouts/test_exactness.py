"""
Which savings are exact for which loss, and which models have relative positions.
"""

import re
from itertools import product

import architectures
import pytest
import tiny
import trl
from architectures import rope
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_ext.rollouts.exactness import (
    ExactSavings,
    FullWidth,
    exact_savings,
    fewest_rows,
    has_relative_positions,
    needs_full_width,
)


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


class TestExactSavings:
    def exact(self, loss_type: str, relative_positions: bool = True, **terms: bool) -> ExactSavings:
        terms = {"kl": False, "entropy_terms": False, "aux_loss": False, **terms}
        return exact_savings(loss_type, relative_positions=relative_positions, **terms)

    def test_these_are_trls_losses(self):
        text = trl.GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
        supported = text.split("Supported values are ")[1].split(".")[0]
        assert set(re.findall("'([a-z_]+)'", supported)) == set(LOSSES)

    def test_all_but_bnpo_give_everything(self, subtests):
        for loss_type in [loss for loss in LOSSES if loss != "bnpo"]:
            with subtests.test(loss_type=loss_type):
                assert self.exact(loss_type) == ExactSavings(True, True, True, True)

    def test_bnpo_divides_by_its_own_tokens(self):
        savings = self.exact("bnpo")
        assert savings == ExactSavings(True, False, False, False, reasons=savings.reasons)
        assert savings.reasons == (
            "rows keep their micro-batch, and all are computed: loss_type='bnpo' divides by the tokens of its "
            "micro-batch",
        )

    def test_kl_moves_rows_without_advantage(self, subtests):
        for loss_type in [loss for loss in LOSSES if loss != "bnpo"]:
            with subtests.test(loss_type=loss_type):
                savings = self.exact(loss_type, kl=True)
                assert savings == ExactSavings(True, True, False, False, reasons=savings.reasons)
                assert len(savings.reasons) == 1 and "KL term (beta)" in savings.reasons[0]

    def test_terms_over_a_micro_batch_keep_it_together(self, subtests):
        for loss_type, kl, (term, reason) in product(
            LOSSES, [True, False], [("entropy_terms", "entropy"), ("aux_loss", "auxiliary")]
        ):
            with subtests.test(loss_type=loss_type, kl=kl, term=term, reason=reason):
                savings = self.exact(loss_type, kl=kl, **{term: True})
                assert savings == ExactSavings(True, False, False, False, reasons=savings.reasons)
                assert len(savings.reasons) == 1 and reason in savings.reasons[0]
                assert ("bnpo" in savings.reasons[0]) == (loss_type == "bnpo")

    def test_absolute_positions_keep_the_padding_of_prompts(self):
        savings = self.exact("dapo", relative_positions=False)
        assert savings == ExactSavings(False, True, True, True, reasons=savings.reasons)
        assert len(savings.reasons) == 1 and "left padding" in savings.reasons[0]
        assert len(self.exact("bnpo", relative_positions=False, aux_loss=True).reasons) == 2

    def test_all_padding_is_kept_in_wide_batches(self):
        savings = self.exact("dapo", full_width=FullWidth(12, "for a reason"))
        assert savings.for_width(11) is savings
        wide = savings.for_width(12)
        assert (savings.trim_prompts, savings.trim_completions) == (True, True)
        assert (wide.trim_prompts, wide.trim_completions) == (False, False)
        assert (wide.regroup, wide.skip_dead, wide.weigh_copies) == (True, True, True)
        assert savings.reasons == (
            "in batches of 12 or more columns, the padding of prompts and completions is kept: for a reason",
        )

    def test_all_padding_is_kept(self):
        savings = self.exact("dapo", relative_positions=False, full_width=FullWidth(0, "for a reason"))
        assert not savings.for_width(1).trim_completions
        assert savings.reasons == ("the padding of prompts and completions is kept: for a reason",)


# Which models have relative positions

RELATIVE = [
    *("qwen2", "qwen2_moe", "qwen3", "llama", "llama_yarn", "llama_llama3", "llama_linear", "llama_proportional"),
    *("mistral_sliding", "gemma", "gemma2", "gemma3_text", "gemma4_text", "phi3", "olmo2", "gpt_neox", "smollm3"),
]
NOT_KNOWN = ["gpt2", "opt", "mamba", "lfm2", "llama4_text", "qwen3_next", "bloom", "recurrent_gemma"]


class TestRelativePositions:
    @pytest.mark.parametrize("name", RELATIVE)
    def test_known_to_be_relative(self, name):
        model = architectures.model(name)
        assert has_relative_positions(model) and needs_full_width(model) is None

    @pytest.mark.parametrize("name", NOT_KNOWN)
    def test_the_others_are_not(self, name):
        model = architectures.model(name)
        assert not has_relative_positions(model) and needs_full_width(model) is None

    @pytest.mark.parametrize("name", architectures.WIDTH_DEPENDENT)
    def test_relative_in_narrow_batches(self, name):
        model = architectures.model(name)
        full_width = needs_full_width(model)
        assert has_relative_positions(model)
        assert full_width is not None and full_width.columns == architectures.SHORT
        assert ("dynamic" if "dynamic" in name else "longrope") in full_width.reason

    @pytest.mark.parametrize(
        "settings",
        [
            {"rope_parameters": rope("default", mrope_section=[1, 1, 2])},
            {"rope_parameters": rope("yarn", factor=2.0, llama_4_scaling_beta=0.1)},
            {"rope_parameters": rope("xpos")},
            {"attn_temperature_tuning": True},
            {"layer_types": ["full_attention", "linear_attention"]},
            {"rope_parameters": None},
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "other": {"rope_type": "xpos"}}},
        ],
    )
    def test_what_is_not_known_counts_as_absolute(self, settings):
        model = tiny.qwen2()
        assert has_relative_positions(model)
        for name, value in settings.items():
            object.__setattr__(model.config, name, value)
        assert not has_relative_positions(model)

    def test_a_model_without_configuration(self):
        assert not has_relative_positions(nn.Linear(2, 2))

    def test_adapters_take_after_their_model(self):
        config = LoraConfig(r=2, target_modules=["q_proj"])
        assert has_relative_positions(get_peft_model(tiny.qwen2(), config))
        assert not has_relative_positions(get_peft_model(tiny.gpt2(), LoraConfig(r=2, target_modules=["c_attn"])))


# Which models need all padding, or several rows


class TestFullWidth:
    @pytest.mark.parametrize(
        ("settings", "columns"),
        [
            ({"rope_parameters": rope("xpos")}, 0),
            ({"rope_parameters": rope("dynamic", factor=2.0)}, 128),
            ({"rope_parameters": rope("dynamic", factor=2.0, original_max_position_embeddings=32)}, 32),
            ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
            ({"rope_parameters": {"full_attention": rope("default"), "other": rope("longrope")}}, 128),
            ({"rope_parameters": {"full_attention": rope("default"), "other": None}}, None),
        ],
    )
    def test_rotary_embeddings_that_depend_on_the_width(self, settings, columns):
        model = tiny.qwen2()
        for name, value in settings.items():
            object.__setattr__(model.config, name, value)
        full_width = needs_full_width(model)
        assert (full_width.columns if full_width else None) == columns

    def test_the_part_that_reads_text_decides(self):
        """As in vision-language models, whose configuration holds that of the language model."""
        model, text = tiny.qwen2(), tiny.qwen2().config
        text.rope_parameters = rope("dynamic", factor=2.0)
        object.__setattr__(model.config, "text_config", text)
        assert needs_full_width(model) == FullWidth(128, needs_full_width(model).reason)

    def test_code_of_its_own(self):
        """transformers imports what `trust_remote_code` allows into a package of this name."""
        model = tiny.qwen2()
        assert needs_full_width(model) is None
        own = type("OwnLayer", (nn.Identity,), {"__module__": "transformers_modules.someone.a_model.modeling"})
        model.model.layers.append(own())
        full_width = needs_full_width(model)
        assert full_width is not None and full_width.columns == 0 and "not part of transformers" in full_width.reason
        assert not has_relative_positions(model)

    def test_a_model_without_configuration(self):
        assert needs_full_width(nn.Linear(2, 2)) is None

    def test_adapters_take_after_their_model(self):
        model = get_peft_model(architectures.model("llama_dynamic"), LoraConfig(r=2, target_modules=["q_proj"]))
        assert needs_full_width(model) == needs_full_width(architectures.model("llama_dynamic"))

    def test_several_rows_where_there_is_a_convolution(self):
        assert [fewest_rows(architectures.model(name)) for name in ("llama", "mamba2", "lfm2")] == [1, 2, 2]
