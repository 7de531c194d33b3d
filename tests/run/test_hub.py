"""Requests to the Hub that are repeated, and those that aren't. Whole runs are in `tests/recipes/test_push.py`."""

import threading

import httpx2
import pytest
from hub import running_hub
from huggingface_hub import close_session, constants, get_session, set_client_factory

from trl_ext.run import hub as patience


ASKED = "/api/whoami"


@pytest.fixture
def hub(monkeypatch):
    before = get_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(patience, "WAITS", (0.01, 0.02))
    patience.be_patient(1.0)
    with running_hub() as (running, address):
        yield running, address
    hooks = before.event_hooks
    set_client_factory(lambda: type(before)(event_hooks=hooks, follow_redirects=True, timeout=None))


def test_a_busy_hub_is_asked_again(hub):
    running, address = hub
    running.every = 3
    for _ in range(7):
        assert get_session().get(f"{address}{ASKED}").json()["name"] == "someone"
    sent = {"name": "tiny"}
    for _ in range(4):
        assert get_session().post(f"{address}/api/repos/create", json=sent).status_code == 200
    assert running.created == [sent] * 4 and running.failed == len(running.requests) // 3 > 4


def test_a_hub_that_stays_busy_is_given_up(hub):
    running, address = hub
    running.every = 1
    assert get_session().get(f"{address}{ASKED}").status_code == 503
    assert len(running.requests) == 1 + len(patience.WAITS)


def test_a_connection_that_was_lost_is_made_again(hub):
    running, address = hub
    running.away_after = 0
    with pytest.raises(httpx2.TransportError):
        get_session().get(f"{address}{ASKED}")
    assert len(running.requests) == 1 + len(patience.WAITS)


def test_a_refusal_and_silence_are_final(hub):
    running, address = hub
    assert get_session().get(f"{address}/none").status_code == 404
    running.silent = threading.Event()
    with pytest.raises(httpx2.TimeoutException):
        get_session().post(f"{address}/api/models/someone/tiny/commit/main", content=b"{}")
    assert len(running.requests) == 2


def test_what_is_read_while_it_is_sent_goes_once(hub):
    running, address = hub
    running.every = 1
    body = (chunk for chunk in [b"a", b"b"])
    assert get_session().put(f"{address}/lfs/1", content=body, headers={"Content-Length": "2"}).status_code == 503
    assert len(running.requests) == 1


def test_a_new_client_is_as_patient(hub):
    """The Hub's own code closes its client after some failures."""
    running, address = hub
    close_session()
    running.every = 2
    assert [get_session().get(f"{address}{ASKED}").status_code for _ in range(3)] == [200] * 3
    assert running.failed == 2


def test_a_busy_hub_says_how_long(hub, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    answers = iter([httpx2.Response(429, headers={"Retry-After": "7"}), httpx2.Response(503), httpx2.Response(200)])
    client = patience._patient(httpx2.Client(transport=httpx2.MockTransport(lambda request: next(answers))))
    assert client.get("http://hub/").status_code == 200
    assert waited == [7.0, 0.02]
