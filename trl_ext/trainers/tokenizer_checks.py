"""
Checks of tokenizers against data and models. A token id that a model has no embedding for is an IndexError on a CPU,
and on a GPU an assertion that names nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import require, require_type, shown
from ..rollouts.prompt_forms import MESSAGES, form_of
from ..rollouts.prompts import TokenizedPrompt


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raises `TypeError` unless a tokenizer is one; `None` stands for the model's own."""
    if tokenizer is not None:
        remedy = "Pass a tokenizer or a processor, such as AutoTokenizer.from_pretrained(...), or leave it out."
        require_type(name, tokenizer, PreTrainedTokenizerBase | ProcessorMixin, remedy)


def check_chat_template(name: str, tokenizer: Any, prompts: Sequence[Any]) -> None:
    """Raises `ValueError` if prompts are messages, and the tokenizer has no chat template to make text of them."""
    has_messages = bool(prompts) and form_of(prompts[0]) == MESSAGES
    require(
        not has_messages or getattr(tokenizer, "chat_template", "") is not None,
        f"Prompts are messages, and {name}, {shown(tokenizer)}, has no chat template. Set its chat_template (or use "
        "the tokenizer of an instruction-tuned model), or pass prompts as text.",
    )


def vocabulary_of(model: Any) -> int | None:
    """The number of tokens that a loaded model has embeddings for; `None` if its configuration doesn't say."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    return getattr(text, "vocab_size", None)


def check_vocabulary(model_name: str, model: Any, name: str, tokenizer: Any, prompts: Sequence[Any]) -> None:
    """
    Raises `ValueError` if a tokenizer makes an id for which a model has no embedding. Only ids that are sure to reach
    the model count: padding, and those of some prompts. (Some tokenizers have more tokens than their model.)

    Args:
        model_name, name (`str`):
            What the model and the tokenizer are called.
        model ([`~transformers.PreTrainedModel`]), tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The two.
        prompts (`Sequence[Any]`):
            Some prompts, text or messages.
    """
    size = vocabulary_of(model)
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if size is None or inner is None:
        return
    ids = [inner.pad_token_id or 0]
    for text in _texts(prompts):
        ids += text.input_ids if isinstance(text, TokenizedPrompt) else inner(text)["input_ids"]
    largest = max(ids)
    require(
        largest < size,
        f"{name} makes the token id {largest} ({inner.convert_ids_to_tokens(largest)!r}), and {model_name} has only "
        f"{size} embeddings. Pass the tokenizer that belongs to it, or call resize_token_embeddings(len(tokenizer)) "
        "after adding tokens.",
    )


def _texts(prompts: Sequence[Any]) -> Iterator[str]:
    """The text in prompts, without what a chat template adds."""
    for prompt in prompts:
        if isinstance(prompt, str):
            yield prompt
        else:
            yield from (message["content"] for message in prompt if isinstance(message.get("content"), str))
