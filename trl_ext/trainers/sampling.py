"""
How completions are sampled has one source of truth: TRL's arguments. The loss divides logits by `temperature`, and
masks end at the tokens that end a completion, so that nothing else may say otherwise in silence:

- A key of `generation_kwargs` that TRL has an argument for must not contradict it ([`check_sampling`]).
- A key that reshapes the distribution from which tokens are drawn is refused, because the loss takes log-probabilities
  of the policy's own. It may be used with vLLM's importance sampling correction, which takes the engine's.
- Ids of tokens that end a completion are added to those of the model, in generation, in masks and where truncated
  completions are counted ([`end_completions_at`]).
- The `generation_config` that a model was saved with only says which tokens end a completion
  ([`sampling_as_told`]).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import trl
from transformers import GenerationConfig

from ..errors import require


# Keys that TRL has an argument for
ARGUMENT_OF = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens"), "max_completion_length"),
    **dict.fromkeys(("num_return_sequences", "n"), "num_generations"),
    "cache_implementation": "cache_implementation",
}
# Ids of tokens that end a completion; the latter is vLLM's
ENDS = ("eos_token_id", "stop_token_ids")
# Values that change nothing
PLAIN = {
    **{"do_sample": True, "num_beams": 1, "num_return_sequences": 1, "n": 1, "typical_p": 1.0},
    **dict.fromkeys(("min_new_tokens", "min_length", "min_tokens", "no_repeat_ngram_size"), 0),
}
# Of transformers: keys that change how tokens are computed, not which
COMPUTE = ("use_cache", "cache_config", "max_cache_len", "compile_config", "prefill_chunk_size", "max_time")
# Of vLLM: keys that reshape the distribution, and keys that nothing in the loss can honour
RESHAPING = (
    *("presence_penalty", "frequency_penalty", "min_tokens", "logit_bias", "allowed_token_ids", "bad_words"),
    *("structured_outputs", "logits_processors"),
)
REFUSED = ("stop", "ignore_eos", "seed", "logprobs", "prompt_logprobs")

OTHER_DISTRIBUTION = "draws tokens from another distribution than the one whose log-probabilities the loss takes"
ENDS_UNSEEN = "ends completions in a way that masks and the count of truncated completions don't see"
BY_REWARD = "Leave it out: a reward function can punish what it prevents."
# Why a key is refused, and what to do instead
REASONS = {
    **dict.fromkeys(("stop_strings", "stop", "forced_eos_token_id", "ignore_eos"), ENDS_UNSEEN),
    "seed": "makes the completions of a group equal",
    **dict.fromkeys(("logprobs", "prompt_logprobs"), "is for TRL to set"),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), "is the tokenizer's to say"),
    "disable_compile": "is for TRL to set",
}
REMEDIES = {
    **dict.fromkeys(("stop_strings", "stop"), "Set eos_token_id to the ids of the tokens that end a completion."),
    **dict.fromkeys(("min_new_tokens", "min_length", "min_tokens", "suppress_tokens"), BY_REWARD),
    **dict.fromkeys(("begin_suppress_tokens", "bad_words_ids", "sequence_bias", "no_repeat_ngram_size"), BY_REWARD),
    "do_sample": "Leave it out, and set a low temperature if completions should differ less.",
    "seed": "Set the argument seed.",
    **dict.fromkeys(("pad_token_id", "bos_token_id"), "Set it on the tokenizer that you pass as processing_class."),
}


def check_sampling(config: trl.GRPOConfig) -> None:
    """
    Refuses settings of sampling that contradict the arguments of `config`, or that its loss doesn't honour.

    Raises:
        ValueError: that names the setting and the remedy.
    """
    penalty = config.repetition_penalty
    require(
        penalty == 1.0 or not config.use_transformers_continuous_batching,
        f"repetition_penalty={penalty} has no effect with use_transformers_continuous_batching=True, which leaves it "
        "out. Set repetition_penalty=1.0, or use another way to generate.",
    )
    settings: Any = config.generation_kwargs
    for key, value in (settings or {}).items():
        if value is None or (key in PLAIN and value == PLAIN[key]):
            continue
        if key in ENDS:
            _check_ends(config, key, value)
        elif key in ARGUMENT_OF:
            name = ARGUMENT_OF[key]
            require(
                value == getattr(config, name),
                f"generation_kwargs={{{key!r}: {value!r}}} contradicts {name}={getattr(config, name)!r}. Set "
                f"{name}={value!r} instead, and leave {key!r} out of generation_kwargs.",
            )
        elif config.use_vllm:
            corrected = bool(config.vllm_importance_sampling_correction)
            remedy = "Set vllm_importance_sampling_correction=True, or leave it out."
            require(key not in REFUSED, _refusal(key, value))
            require(key not in RESHAPING or corrected, _refusal(key, value, remedy))
        else:
            known = vars(GenerationConfig())
            nearest = get_close_matches(key, [*known, *ARGUMENT_OF], n=1)
            meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
            require(
                key in known, f"generation_kwargs={{{key!r}: {value!r}}} is nothing that transformers knows.{meant}"
            )
            require(key in COMPUTE, _refusal(key, value))


def _refusal(key: str, value: Any, remedy: str = "Leave it out.") -> str:
    reason = REASONS.get(key, OTHER_DISTRIBUTION)
    return f"generation_kwargs={{{key!r}: {value!r}}} {reason}. {REMEDIES.get(key, remedy)}"


def _check_ends(config: trl.GRPOConfig, key: str, value: Any) -> None:
    require(
        key == "eos_token_id" or config.use_vllm,
        f"generation_kwargs={{{key!r}: {value!r}}} is vLLM's name. Without use_vllm=True, set 'eos_token_id'.",
    )
    stop_token_id = getattr(config, "stop_token_id", None)  # PPO's
    require(
        stop_token_id is None,
        f"stop_token_id={stop_token_id} and generation_kwargs={{{key!r}: {value!r}}} both end completions. Set one of "
        "them.",
    )
    ids = [value] if isinstance(value, int) else value
    require(
        isinstance(ids, list | tuple) and all(isinstance(i, int) and i >= 0 for i in ids),
        f"generation_kwargs={{{key!r}: {value!r}}} must be the id of a token, or a list of ids.",
    )


def further_ends(config: trl.GRPOConfig) -> list[int]:
    """Ids of tokens that end a completion besides those of the model and the tokenizer, from `generation_kwargs`."""
    settings: Any = config.generation_kwargs or {}
    given = [settings[key] for key in ENDS if settings.get(key) is not None]
    return [i for ids in given for i in ([ids] if isinstance(ids, int) else ids)]


def end_completions_at(trainer: trl.GRPOTrainer, token_ids: Sequence[int]) -> None:
    """Lets completions end at these tokens and no others, in generation and in what TRL makes of completions."""
    ends = list(dict.fromkeys(token_ids))
    trainer.eos_token_ids = ends
    if not trainer.use_vllm:
        trainer.generation_config.eos_token_id = ends
        trainer.generation_kwargs["eos_token_id"] = ends
        return
    # vLLM stops at the tokenizer's token and at the model's, unless it is told not to
    engine: Any = trainer.vllm_generation
    others = {key: value for key, value in engine.generation_kwargs.items() if key not in ENDS}
    tokenizer: Any = trainer.processing_class
    own = getattr(tokenizer, "tokenizer", tokenizer).eos_token_id
    engine.generation_kwargs = others | {"stop_token_ids": ends} | ({} if own in ends else {"ignore_eos": True})


@contextmanager
def sampling_as_told(trainer: trl.GRPOTrainer) -> Iterator[None]:
    """
    While completions are generated, nothing of the `generation_config` that the model was saved with acts:
    transformers would fill in from it whatever TRL leaves open, such as `min_p` and `num_beams`. (Its tokens that end
    a completion are among TRL's `eos_token_ids`.)
    """
    unwrap: Any = trainer.accelerator.unwrap_model
    # PEFT's models may hold one of their own
    holders = [
        m for m in unwrap(trainer.model).modules() if isinstance(vars(m).get("generation_config"), GenerationConfig)
    ]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config
