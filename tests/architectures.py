"""
Tiny models of the architectures of transformers that are causal language models: built from a configuration and a
seed, and with noise on every weight, because biases and scales that are still 0 and 1 hide what they act on.
"""

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# What of this a configuration has
SHAPE: dict[str, Any] = {
    **{"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **{"head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "q_lora_rank": 8},
    **{"kv_lora_rank": 8, "intermediate_size": 32, "ffn_dim": 32, "vocab_size_per_layer_input": 24},
    **{"hidden_size_per_layer_input": 4, "sliding_window": 6, "attention_chunk_size": 4, "floor_scale": 4},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **{"num_experts_per_tok": 2, "num_shared_experts": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 16},
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_d_conv"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **{"mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_dt_rank": 4},
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_window_size"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **{"use_mamba_kernels": False, "num_kv_shared_layers": 0, "dropout": 0.0},
}
HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]}

# Where the shape isn't enough
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"head_dim": 4},
    "gemma2": {"query_pre_attn_scalar": 8, **HALF_SLIDING},
    "gemma3_text": {"query_pre_attn_scalar": 8, **HALF_SLIDING},
    "gemma3n_text": {"laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], **HALF_SLIDING},
    "gemma4_text": {"global_head_dim": 8, **HALF_SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**HALF_LINEAR, "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": HALF_LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        **{"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
        **{"intermediate_size_mlp": 32, "attn_temperature_tuning": True},
    },
    "longcat_flash": {
        **{"ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "moe_topk": 2, "head_dim": 4},
    },
    "mamba2": {"num_heads": 4, "expand": 2},
    "minimax": {**HALF_LINEAR, "block_size": 4},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {
        **{"layers_block_type": ["linear_attention", "full_attention", "moe"], "num_hidden_layers": 3},
        **{"mamba_num_heads": 4, "mamba_head_dim": 8},
    },
    "olmo_hybrid": HALF_LINEAR,
    "qwen3_5_text": HALF_LINEAR,
    "qwen3_next": HALF_LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 16, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "youtu": {"head_dim": 4},
    "zamba2": {
        **ZAMBA,
        **{"hybrid_layer_ids": [1], "n_mamba_heads": 4, "mamba_headdim": 8, "adapter_rank": 4},
        **{"use_shared_attention_adapter": False},
    },
}


def rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 100.0, **settings}


# Columns that the rotary embeddings below were trained on
SHORT = 12
DYNAMIC = rope("dynamic", factor=4.0)
LONG = {
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 8.0,
    "original_max_position_embeddings": SHORT,
}
LONGROPE = rope("longrope", **LONG)
TRAINED_ON = {"max_position_embeddings": SHORT}

# Further architectures: one of those above, with other settings
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_linear": ("llama", {"rope_parameters": rope("linear", factor=2.0)}),
    "llama_yarn": (
        "llama",
        {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama_llama3": (
        "llama",
        {
            "rope_parameters": rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
            )
        },
    ),
    "llama_proportional": ("llama", {"rope_parameters": rope("proportional", partial_rotary_factor=0.5)}),
    "llama_dynamic": ("llama", {"rope_parameters": DYNAMIC, **TRAINED_ON}),
    "llama_longrope": ("llama", {"rope_parameters": LONGROPE}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": SHORT}),
    "gemma3_dynamic": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": rope("default")}, **TRAINED_ON},
    ),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, **HALF_SLIDING}),
    "mistral_sliding": ("mistral", {"sliding_window": 4}),
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
}

# Sees padding on the right, or the whole width
WIDTH_DEPENDENT = ("llama_dynamic", "llama_longrope", "phi3_longrope", "gemma3_dynamic")

MOST_WEIGHTS = 3_000_000


class TooLarge(Exception):
    """The shape leaves a model large."""


def names() -> list[str]:
    """All architectures, whether or not they can be built."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def model(name: str, seed: int = 0) -> Any:
    """
    A model of an architecture, in evaluation mode.

    Raises:
        TooLarge: if it isn't tiny. Configurations that don't go with [`SHAPE`] raise what they like.
    """
    architecture, variant = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[architecture]
    known = set(config_class().to_dict()) | set(inspect.signature(config_class.__init__).parameters)
    shape = {key: value for key, value in SHAPE.items() if key in known}
    config = config_class(**shape | SETTINGS.get(architecture, {}) | variant)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        raise TooLarge(f"{weights} weights")
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() < 2 else 0.1))
    return built
