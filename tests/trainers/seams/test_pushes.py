"""Uploads in the background that fail, or don't end. (Whole runs with a Hub are in `tests/recipes/test_push.py`.)"""

import concurrent.futures
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from transformers.utils import PushInProgress

from trl_ext.trainers.seams import pushes
from trl_ext.trainers.seams.pushes import push_of_checkpoint, wait_for_pushes


@pytest.fixture(autouse=True)
def state() -> None:
    """A trainer has one, which warnings need."""
    PartialState()


def trainer(*jobs: Any) -> Any:
    args = SimpleNamespace(output_dir="out")
    return SimpleNamespace(args=args, hub_model_id="someone/tiny", push_in_progress=PushInProgress(list(jobs)))


def job(error: Exception | None = None) -> "concurrent.futures.Future[None]":
    done: concurrent.futures.Future[None] = concurrent.futures.Future()
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
    return done


def test_what_failed_is_reported_once(caplog):
    made = trainer(job(), job(ConnectionError("no\nroute")), job())
    wait_for_pushes(made)
    (record,) = caplog.records
    assert "not pushed to someone/tiny (ConnectionError: no route)" in record.message
    assert "saved in out" in record.message
    caplog.clear()
    wait_for_pushes(made)
    with push_of_checkpoint(made):
        pass
    assert not caplog.records


def test_a_client_that_fails_at_once_ends_nothing(caplog):
    with push_of_checkpoint(trainer(job(OSError("disk full")))):
        raise ConnectionError("no route")
    assert ["OSError" in record.message for record in caplog.records] == [True, False]
    with pytest.raises(KeyboardInterrupt), push_of_checkpoint(trainer()):
        raise KeyboardInterrupt


def test_one_that_does_not_end_is_left_to_itself(caplog, monkeypatch):
    monkeypatch.setattr(pushes, "PATIENCE", 0.05)
    released = threading.Event()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = trainer(job(ValueError("refused")), pool.submit(released.wait, 10))
        wait_for_pushes(made)
        released.set()
    assert made.push_in_progress is None
    assert ["refused" in caplog.text, "has not ended after 0 s" in caplog.text] == [True, True]


def test_without_a_hub():
    wait_for_pushes(SimpleNamespace())
    wait_for_pushes(SimpleNamespace(push_in_progress=None))
