"""
The Hub, which may be busy or out of reach. A request that fails is repeated a few times, one that gets no answer has
failed, and an upload that fails is reported in one line; what the run has written stays.
"""

import importlib
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import get_session, set_client_factory

from ..trainers.seams.pushes import BUSY_OR_BROKEN


logger = logging.getLogger(__name__)

# Seconds before a request is repeated: the second try, the third, and so on
WAITS = (1.0, 2.0, 4.0)
LONGEST_WAIT = 60.0  # that a busy Hub can ask for


def be_patient(silence: float) -> None:
    """
    Have the requests of this process to the Hub repeated where that may help: after an answer that says that the Hub
    is busy or has failed, and where no connection was made or it was lost. The Hub's own client repeats only some of
    them, not those that create a repository or a commit.

    Args:
        silence (`float`):
            Seconds after which a request without an answer has failed. It isn't repeated. The Hub's own client would
            wait for ever.
    """
    given: Any = get_session()
    settings = {"event_hooks": given.event_hooks, "follow_redirects": given.follow_redirects, "timeout": silence}
    # The Hub's client closes what it has after some failures, and asks for a new one
    set_client_factory(lambda: _patient(type(given)(**settings)))


def _patient(client: Any) -> Any:
    """A client that repeats its requests."""
    package = importlib.import_module(type(client).__module__.partition(".")[0])  # httpx, or what followed it
    send_once = client.send

    def send(request: Any, **options: Any) -> Any:
        # What is read while it is sent can't be sent again; for files the Hub's client sees to that itself
        for wait in WAITS if isinstance(request.stream, package.ByteStream) else ():
            try:
                answer = send_once(request, **options)
            except package.TimeoutException:
                raise
            except package.TransportError as error:
                reason = type(error).__name__
            else:
                if answer.status_code not in BUSY_OR_BROKEN:
                    return answer
                asked = answer.headers.get("Retry-After", "")
                wait = min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait
                reason = f"status {answer.status_code}"
                answer.close()
            logger.info("The Hub has failed (%s); the request is repeated in %g s.", reason, wait)
            time.sleep(wait)
        return send_once(request, **options)

    client.send = send
    return client


@contextmanager
def uploading(
    folder: str | Path,
    repo_id: str | None,
    left_out: Sequence[str],
    revision: str | None = None,
    private: bool | None = None,
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
        private (`bool`, *optional*):
            Whether the repository is private, if the command has to create it.
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
        command += ["--private"] if private else []
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"Not pushed to {repo_id} ({reason}). All is saved in {folder}; upload it with: {shlex.join(command)}",
            file=sys.stderr,
            flush=True,
        )
    else:
        print(f"Pushed to https://huggingface.co/{repo_id}.", flush=True)
