"""A service behind HTTP that dies, hangs, or answers nonsense: a real one, in a thread of this process."""

import asyncio
import json
import math
import socket
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import tiny
import torch

from trl_ext import DAPOTrainer, RewardFunctionError, ServiceReward
from trl_ext.rewards.guard import FAILED, RewardServiceError, guard
from trl_ext.trainers.seams.whole_checkpoints import checkpoints_of, damage


class Service:
    """Scores completions. `answers` says what it does with the next calls, and the last of them is for all after."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.asked: list[float] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append(time.monotonic())
                answer = service.answers.pop(0) if len(service.answers) > 1 else (service.answers or ["scores"])[0]
                scores: list[Any] = tiny.hashed(ids)
                if answer == "dies":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if answer == "hangs":
                    time.sleep(3)
                nonsense = {"NaN": [math.nan, *scores[1:]], "too few": scores[1:], "text": ["good"] * len(scores)}
                body = b"<html>" if answer == "no JSON" else json.dumps(nonsense.get(answer, scores)).encode()
                self.send_response(500 if answer == "500" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, daemon=True).start()

    def judge(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        url = f"http://127.0.0.1:{self.server.server_port}"
        with urllib.request.urlopen(url, json.dumps(completion_ids).encode(), timeout=10) as response:
            scores: list[float] = json.load(response)
        return scores

    async def judge_later(self, **columns: Any) -> list[float]:
        return await asyncio.to_thread(self.judge, **columns)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.server.shutdown()
    made.server.server_close()


FAULTS = ["dies", "hangs", "500", "no JSON", "NaN", "too few", "text"]
COLUMNS = {"prompts": ["a"] * 3, "completions": ["b", "c", "d"], "completion_ids": [[4], [5, 6], [7]]}
QUICK = {"retries": 2, "first_wait": 0.05, "timeout": 0.5}


@pytest.fixture(params=["sync", "async"])
def call(request, service):
    """Calls a service's function that is retried; returns what TRL would get, and the fault."""

    def run(**settings: Any) -> Any:
        asked = ServiceReward(service.judge if request.param == "sync" else service.judge_later, **QUICK, **settings)

        def once(columns: dict[str, Any]) -> Any:
            judged = guard(asked, "judge")
            answer = judged(**columns)
            return (asyncio.run(answer) if request.param == "async" else answer), judged.fault

        return once, asked

    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails_is_made_again_after_longer_and_longer_waits(call, service, fault):
    service.answers = [fault, fault, "scores"]
    once, asked = call()
    began = time.monotonic()
    assert once(COLUMNS) == (tiny.hashed(COLUMNS["completion_ids"]), None)
    assert len(service.asked) == 3 and asked.missing == 0
    assert time.monotonic() - began >= 0.05 + 0.1
    if fault != "hangs":
        assert service.asked[2] - service.asked[1] >= 0.1 and service.asked[1] - service.asked[0] >= 0.05


@pytest.mark.parametrize("fault", FAULTS)
def test_then_its_completions_have_no_reward_and_then_the_run_stops(call, service, fault):
    service.answers = [fault]
    once, asked = call(most_missing=3)
    assert once(COLUMNS) == ([None] * 3, None)
    assert len(service.asked) == 3 and asked.missing == 3
    rewards, problem = once(COLUMNS)
    assert rewards == [FAILED] * 3
    assert "for 6 completions in a row, and most_missing=3" in problem and "here is its first sample" in problem
    assert len(service.asked) == 6  # not for single samples, too
    once(COLUMNS)
    assert len(service.asked) == 7  # given up: asked once
    service.answers = ["scores"]
    assert once(COLUMNS) == (tiny.hashed(COLUMNS["completion_ids"]), None)
    assert asked.missing == 0


def test_what_a_failed_call_logs_is_not_logged():
    logged: list[tuple[str, Any]] = []
    calls = iter([ZeroDivisionError, None])

    def judge(log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("asked", 1.0)
        error = next(calls)
        if error:
            raise error
        return [0.0] * 3

    columns = {**COLUMNS, "log_metric": lambda *pair: logged.append(pair)}
    assert ServiceReward(judge, first_wait=0.0)(**columns) == [0.0] * 3
    assert logged == [("asked", 1.0), ("rewards/judge/retries", 1.0), ("rewards/judge/missing", 0.0)]


def test_without_an_answer_by_hand(service):
    service.answers = ["dies"]
    with pytest.raises(RewardServiceError, match="most_missing=0"):
        ServiceReward(service.judge, retries=0, most_missing=0)(**COLUMNS)


def trained(folder: Any, reward: Any, resume: bool = False, **settings: Any) -> Any:
    settings = {"max_steps": 4, "save_strategy": "no", **settings}
    trainer = tiny.trainer(DAPOTrainer, folder, reward, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.train
@pytest.mark.parametrize("settings", [{}, {"rewards_in_flight": 2}], ids=["", "in flight"])
def test_a_run_whose_service_fails_now_and_then_is_the_run_whose_service_never_does(service, tmp_path, settings):
    reward = ServiceReward(service.judge, **QUICK)
    whole = trained(tmp_path / "whole", reward, **settings)
    service.answers = ["dies", "scores", "NaN", "500", "scores"]
    again = trained(tmp_path / "again", reward, **settings)
    assert not service.answers[1:]
    for name, value in tiny.weights(whole.model).items():
        assert torch.equal(tiny.weights(again.model)[name], value), name


@pytest.mark.train
def test_a_run_whose_service_dies_stops_with_a_checkpoint_and_goes_on_when_it_is_back(service, tmp_path):
    # Two steps work; then one batch and its rounds of refilling go without rewards, until 40 completions have none
    service.answers = ["scores", "scores", "dies"]
    reward = ServiceReward(service.judge, retries=1, first_wait=0.01, most_missing=40)
    with pytest.raises(RewardFunctionError, match=r"`judge` raised RewardServiceError: .* most_missing=40") as error:
        trained(tmp_path, reward)
    (checkpoint,) = checkpoints_of(tmp_path)
    assert damage(checkpoint) is None and checkpoint.name in "".join(error.value.__notes__)
    service.answers = []
    again = trained(tmp_path, reward, resume=True)
    assert again.state.global_step == 4
