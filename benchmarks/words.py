"""A tokenizer whose words are tokens, for models with random weights."""

from typing import Any


def word_tokenizer(vocabulary: int) -> Any:
    """
    Words `w3`, `w4`, … are the tokens with these numbers.

    Args:
        vocabulary (`int`):
            Number of tokens, of which three are special.
    """
    # Not before the benchmarks have set how many threads there are
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
