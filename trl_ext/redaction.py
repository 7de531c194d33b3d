"""
What must not leave the machine: access tokens and passwords, in texts that are published and in files that are
pickled.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


HIDDEN = "***"
# What follows one of these words in a command line, a yaml file or JSON, spelled with _ or -. `token` alone counts
# as a key only: `eos_token` and `max_tokens` are no secrets.
_NAMED = re.compile(
    r"""((?:hub|hf|auth|access)[_-]token|api[_-]key|password|secret|(?<![\w-])token(?=["']?\s*[:=]))"""
    r"""(["']?[ \t]*[:=][ \t]*["']?|[ \t]+)([^\s"'{},-][^\s"',}]*)""",
    re.IGNORECASE,
)
# Tokens of Hugging Face, GitHub, OpenAI and others, by how they begin
_SHAPED = re.compile(r"\b(?:hf|ghp|gho|github_pat|sk|wandb_v1)[_-][A-Za-z0-9_-]{16,}")
_SECRET_VARIABLE = re.compile(r"TOKEN|(API|ACCESS)_?KEY|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
SHORTEST_VALUE = 8  # of a variable that is looked for in texts: shorter ones may be words


def redact(text: str) -> str:
    """
    A text without access tokens and passwords: those that follow a name such as `hub_token`, those that look like one,
    and the values of environment variables whose names say that they are one.
    """
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_VALUE:
            text = text.replace(value, HIDDEN)
    return _SHAPED.sub(HIDDEN, _NAMED.sub(rf"\1\2{HIDDEN}", text))


def hidden_tokens(settings: Any) -> Any:
    """
    Settings of a configuration as they are logged, with `***` in place of what a dictionary among them has as its
    `token`, such as `model_init_kwargs`. transformers hides its own arguments alone.
    """
    if not isinstance(settings, dict):
        return settings
    hides = {name: HIDDEN for name, value in settings.items() if name == "token" and value is not None}
    return {name: hidden_tokens(value) for name, value in settings.items()} | hides


@contextmanager
def without_secrets(args: Any) -> Iterator[None]:
    """
    Within this context, training arguments hold no access token, so that they can be pickled beside a model: neither
    `hub_token` nor a `token` in `model_init_kwargs`. A `hub_token` is put into the environment, where the Hub's client
    looks for it, and stays there: an upload in the background still needs it.
    """
    token, settings = getattr(args, "hub_token", None), getattr(args, "model_init_kwargs", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
        args.hub_token = None
    if isinstance(settings, dict) and "token" in settings:
        args.model_init_kwargs = {name: value for name, value in settings.items() if name != "token"}
    try:
        yield
    finally:
        if token is not None:
            args.hub_token = token
        args.model_init_kwargs = settings
