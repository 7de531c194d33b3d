"""
The Hub, which may be out of reach when a run is finished. Requests that get no answer fail, and an upload that fails
is reported in one line; what the run has written stays.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_session


def limit_silence(seconds: float) -> None:
    """Have requests to the Hub fail that get no answer for so long. The Hub's client itself would wait for ever."""
    get_session().timeout = seconds


@contextmanager
def uploading(
    folder: str | Path, repo_id: str | None, left_out: Sequence[str], revision: str | None = None
) -> Iterator[None]:
    """
    Within this context, the main process uploads a finished run. It prints where that is, or in one line why it isn't,
    and the command that uploads it. Every process may make the call.

    Args:
        folder (`str` or `Path`):
            Folder of the run.
        repo_id (`str`, *optional*):
            Name of the repository, which the main process knows.
        left_out (`Sequence[str]`):
            Patterns of files that are not uploaded.
        revision (`str`, *optional*):
            Branch. `None`: the repository's main one.
    """
    if repo_id is None:
        yield
        return
    try:
        yield
    except Exception as error:
        command = ["hf", "upload", repo_id, str(folder), "."]
        for pattern in left_out:
            command += ["--exclude", pattern]
        command += [] if revision is None else ["--revision", revision]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"Not pushed to {repo_id} ({reason}). All is saved in {folder}; upload it with: {shlex.join(command)}",
            file=sys.stderr,
            flush=True,
        )
    else:
        print(f"Pushed to https://huggingface.co/{repo_id}.", flush=True)
