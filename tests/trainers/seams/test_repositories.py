"""A Hub that is away when a trainer is made, and what of a checkpoint is pushed. Runs: `recipes/test_push.py`."""

from types import SimpleNamespace

import httpx2
import pytest
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from trl_ext.trainers.seams.pushes import copy_critic, creation_of_repository, out_of_reach


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx2.Response(status, request=httpx2.Request("POST", "http://hub/")))


PASSING = [httpx2.ConnectError("gone"), httpx2.ReadTimeout("slow"), answered(503), answered(500), answered(429)]
FINAL = [answered(401), answered(403), answered(404), OfflineModeIsEnabled(), LocalTokenNotFoundError(), KeyError("a")]


def start(error: Exception, **made: object) -> None:
    PartialState()  # as in a trainer
    with creation_of_repository(SimpleNamespace(args=SimpleNamespace(output_dir="out"), **made)):
        raise error


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_costs_the_pushes_alone(error, caplog):
    assert out_of_reach(error)
    start(error)
    (record,) = caplog.records
    assert "Training starts without one" in record.getMessage() and type(error).__name__ in record.getMessage()
    with pytest.raises(type(error)):  # a push after training
        start(error, control=None)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_the_user_can_change_is_an_error_at_once(error):
    assert not out_of_reach(error)
    with pytest.raises(type(error)):
        start(error)


@pytest.mark.parametrize(
    ("strategy", "main", "under_way", "copied"),
    [
        ("every_save", True, False, True),
        ("end", True, False, False),
        ("every_save", False, False, False),
        ("checkpoint", True, True, False),
    ],
)
def test_the_critic_goes_where_the_policy_goes(strategy, main, under_way, copied, tmp_path):
    (tmp_path / "out/checkpoint-1/critic").mkdir(parents=True)
    (tmp_path / "out/checkpoint-1/critic/a").write_text("new")
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), hub_strategy=strategy, hub_always_push=False)
    push = SimpleNamespace(is_done=lambda: not under_way)
    trainer = SimpleNamespace(args=args, is_world_process_zero=lambda: main, push_in_progress=push)
    copy_critic(trainer, str(tmp_path / "out/checkpoint-1"))
    assert (tmp_path / "out/critic/a").exists() == copied
    copy_critic(trainer, str(tmp_path / "out/checkpoint-2"))  # without a critic
