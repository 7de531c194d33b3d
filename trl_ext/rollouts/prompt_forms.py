"""
The forms that text in a data set can have: plain text, or a list of messages with `role` and `content`. What has
neither form would fail inside a tokenizer or a chat template, where nothing names the column or the row.
"""

from typing import Any

from ..errors import shown


TEXT, MESSAGES = "text", "messages"

TO_MESSAGES = "Messages are dicts such as {'role': 'user', 'content': 'Hello'}"


def form_of(value: Any) -> str:
    """`TEXT` or `MESSAGES`, of a value that has no [`fault_of`]."""
    return TEXT if isinstance(value, str) else MESSAGES


def fault_of(value: Any, needs_content: bool = True) -> str | None:
    """
    Why a value is neither text nor messages, and what to do about it.

    Args:
        value (`Any`):
            A prompt, or one side of a preference pair.
        needs_content (`bool`, *optional*, defaults to `True`):
            Whether every message needs a `content`, as in TRL's generation; otherwise the chat template decides.

    Returns:
        `str` or `None`: the end of a sentence that begins with the value's name; `None` if nothing is wrong with it.
    """
    if isinstance(value, str):
        return None
    if value is None:
        return "is None. Fill it in, or drop such rows with `Dataset.filter`."
    if isinstance(value, dict):
        return f"is {shown(value)}. Write a list of messages, also for a single one. {TO_MESSAGES}."
    if not isinstance(value, list):
        return f"is {shown(value)}. Pass text, or a list of messages. {TO_MESSAGES}."
    if not value:
        return "is an empty list. Write at least one message, or drop such rows with `Dataset.filter`."
    if all(isinstance(token, int) for token in value):
        return f"holds token ids, {shown(value)}. Pass text or messages, which the trainer tokenizes itself."
    for message in value:
        fault = _fault_of_message(message, needs_content)
        if fault is not None:
            return fault
    return None


def _fault_of_message(message: Any, needs_content: bool) -> str | None:
    if not isinstance(message, dict):
        return f"is a list of {type(message).__name__}, {shown(message)}. Write a list of messages. {TO_MESSAGES}."
    if "from" in message and "role" not in message:
        return (
            f"has messages with the keys {sorted(message)} (ShareGPT's). Convert them with "
            "`dataset.map(trl.data_utils.maybe_convert_to_chatml)`, and rename the roles, such as 'human' to 'user' "
            "and 'gpt' to 'assistant'."
        )
    missing = [key for key in ("role", "content") if key not in message and (key == "role" or needs_content)]
    if missing:
        return f"has a message without {missing[0]!r}, {shown(message)}. Add it. {TO_MESSAGES}."
    content = message.get("content")
    if content is None and message["role"] == "user":
        return f"has a message whose content is None, {shown(message)}. Fill it in, or drop such rows."
    if not needs_content or content is None or isinstance(content, str):
        return None
    if not isinstance(content, list) or any(not isinstance(part, dict) or "type" not in part for part in content):
        return (
            f"has a message with the content {shown(content)}. Write text, or a list of parts such as "
            "{'type': 'text', 'text': 'Hello'}."
        )
    return None
