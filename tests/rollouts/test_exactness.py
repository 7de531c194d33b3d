"""
Which savings are exact for which loss, and which models have relative positions.
"""

import re
from itertools import product
from typing import Any

import pytest
import tiny
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_ext.rollouts.exactness import ExactSavings, exact_savings, has_relative_positions


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
                assert self.exact(loss_type) == ExactSavings(True, True, True, True, ())

    def test_bnpo_divides_by_its_own_tokens(self):
        savings = self.exact("bnpo")
        assert savings == ExactSavings(True, False, False, False, savings.reasons)
        assert savings.reasons == (
            "rows keep their micro-batch, and all are computed: loss_type='bnpo' divides by the tokens of its "
            "micro-batch",
        )

    def test_kl_moves_rows_without_advantage(self, subtests):
        for loss_type in [loss for loss in LOSSES if loss != "bnpo"]:
            with subtests.test(loss_type=loss_type):
                savings = self.exact(loss_type, kl=True)
                assert savings == ExactSavings(True, True, False, False, savings.reasons)
                assert len(savings.reasons) == 1 and "KL term (beta)" in savings.reasons[0]

    def test_terms_over_a_micro_batch_keep_it_together(self, subtests):
        for loss_type, kl, (term, reason) in product(
            LOSSES, [True, False], [("entropy_terms", "entropy"), ("aux_loss", "auxiliary")]
        ):
            with subtests.test(loss_type=loss_type, kl=kl, term=term, reason=reason):
                savings = self.exact(loss_type, kl=kl, **{term: True})
                assert savings == ExactSavings(True, False, False, False, savings.reasons)
                assert len(savings.reasons) == 1 and reason in savings.reasons[0]
                assert ("bnpo" in savings.reasons[0]) == (loss_type == "bnpo")

    def test_absolute_positions_keep_the_padding_of_prompts(self):
        savings = self.exact("dapo", relative_positions=False)
        assert savings == ExactSavings(False, True, True, True, savings.reasons)
        assert len(savings.reasons) == 1 and "left padding" in savings.reasons[0]
        assert len(self.exact("bnpo", relative_positions=False, aux_loss=True).reasons) == 2


# Which models have relative positions

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **settings}}


YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)
LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LONGROPE = rope(
    rope_type="longrope",
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
    original_max_position_embeddings=10,
    factor=8.0,
)

RELATIVE = {
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3", {}),
    "llama": ("Llama", {}),
    "llama_yarn": ("Llama", YARN),
    "llama3": ("Llama", LLAMA3),
    "llama_linear": ("Llama", rope(rope_type="linear", factor=2.0)),
    "mistral_sliding": ("Mistral", {"sliding_window": 4}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "gpt_neox": ("GPTNeoX", rope(rope_type="default", partial_rotary_factor=0.25)),
}
NOT_KNOWN = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "llama_dynamic": ("Llama", {"max_position_embeddings": 10, **rope(rope_type="dynamic", factor=2.0)}),
    "phi3_longrope": ("Phi3", LONGROPE),
    "mamba": ("Mamba", {"state_size": 4}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "llama4_chunked": (
        "Llama4",
        {**EXPERTS, "intermediate_size_mlp": 32, "layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 4},
    ),
}


def model_of(kind: str, settings: dict[str, Any]) -> Any:
    config_name = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}.get(kind, f"{kind}Config")
    head = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**SMALL, **settings})
    return getattr(transformers, head)(config).float().eval()


def moved_by_padding(model: Any) -> float:
    """How far log-probabilities move when three columns of left padding are added to a batch that has some already."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 24, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :2] = mask[1, :2] = 0
    more_ids, more_mask = (nn.functional.pad(tensor, (3, 0)) for tensor in (ids, mask))
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        padded = model(input_ids=more_ids, attention_mask=more_mask).logits.log_softmax(-1)[:, 3:]
    return (logps - padded)[mask.bool()].abs().max().item()


class TestRelativePositions:
    @pytest.mark.parametrize("name", RELATIVE)
    def test_known_to_be_relative_and_so_they_are(self, name):
        model = model_of(*RELATIVE[name])
        assert has_relative_positions(model)
        assert moved_by_padding(model) <= 1e-5

    def test_the_others_are_not(self, subtests):
        for name in NOT_KNOWN:
            with subtests.test(name=name), torch.device("meta"):
                assert not has_relative_positions(model_of(*NOT_KNOWN[name]))

    @pytest.mark.parametrize("name", ["gpt2", "llama_dynamic"])
    def test_for_good_reason(self, name):
        model = model_of(*NOT_KNOWN[name])
        assert moved_by_padding(model) > 1e-3

    @pytest.mark.parametrize(
        "settings",
        [
            rope(rope_type="default", mrope_section=[1, 1, 2]),
            rope(rope_type="yarn", factor=2.0, llama_4_scaling_beta=0.1),
            rope(rope_type="proportional"),
            {"attn_temperature_tuning": True},
            {"layer_types": ["full_attention", "linear_attention"]},
            {"rope_parameters": None},
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "other": {"rope_type": "longrope"}}},
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
