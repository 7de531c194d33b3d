"""
Tiny models, tokenizers, data and rewards for tests: built from a config and a seed, nothing is downloaded.
"""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


WORDS = [f"w{i}" for i in range(20)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: pad 0, bos 1, eos 2, unk 3, then w0 … w19."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=(
            "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}w0{% endif %}"
        ),
    )


def qwen2(seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    """About 9k parameters, relative positions, no dropout."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.5,  # far from uniform, so that completions and entropies differ
        "torch_dtype": torch.float32,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **overrides}))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Absolute positions, dropout off."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    return GPT2LMHeadModel(config)


def prompts(count: int = 32, conversational: bool = False) -> Dataset:
    """Distinct prompts of two words, each with a `target` word id from 4 to 23."""
    texts = [f"{WORDS[i % 20]} {WORDS[(i // 20) % 20]}" for i in range(count)]
    rows: list[Any] = [[{"role": "user", "content": text}] for text in texts] if conversational else list(texts)
    return Dataset.from_dict({"prompt": rows, "target": [4 + i % 20 for i in range(count)]})


def cpu_settings(output_dir: Any, **overrides: Any) -> dict[str, Any]:
    """Arguments for a short run on a CPU: 4 prompts × 4 completions in two micro-batches, one optimizer step each."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "seed": 7,
    }
    return {**settings, **overrides}


def low_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of tokens with an even id: groups of a random model nearly always differ in it."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def first_token_even(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 or 0: some groups of a random model have variance, some don't."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def constant(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Every group is dead."""
    return [0.0] * len(completion_ids)
