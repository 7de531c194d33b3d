"""The pairs of a round: sampled, cleaned, and handed to DPO."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from pipelines.dpo_then_ppo_worker import dpo_args, pairs, policy_settings, schedule
from pipelines.runs import Looks, adapter, adapter_of, same, short

from trl_ext import PPOConfig
from trl_ext.curriculum.schedule import DifficultyCurriculum
from trl_ext.pipelines.pairing import prompts_of_round, scored_completions
from trl_ext.preferences.cleaning import CleaningReport
from trl_ext.preferences.pairs import NoPairsError
from trl_ext.rewards.implicit import IMPLICIT_REWARD


@pytest.mark.train
def test_cleaned_before_dpo(tmp_path: Path) -> None:
    seen = []

    def clean(given: Any) -> Any:
        seen.append(len(given))
        return given.select(range(10)), CleaningReport("by hand", ("kept",) * 10, ("",) * 10)

    looks = Looks(lambda trainer: len(trainer.train_dataset))
    short(tmp_path, clean=clean, prepare=looks).train()
    assert seen == [24] and looks.seen["dpo"] == 10
    assert "by hand" in (tmp_path / "round_1/pairs/cleaning.txt").read_text()


@pytest.mark.train
@pytest.mark.parametrize(
    ("clean", "error", "message"),
    [
        (lambda given: (given.select([]), "nothing was good"), ValueError, "left none of 24 pairs:\nnothing was"),
        (lambda given: given, TypeError, "clean returned a Dataset. Let it return the pairs and a report"),
    ],
)
def test_what_clean_may_not_return(tmp_path: Path, clean: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        short(tmp_path, clean=clean).train()
    short(tmp_path).train()  # nothing was finished


@pytest.mark.train
def test_the_order_of_pairs(tmp_path: Path) -> None:
    curriculum = DifficultyCurriculum("easy_to_hard", column="-score_margin")
    looks = Looks(lambda trainer: getattr(trainer, "curriculum", None))
    short(tmp_path, pairs=None, dpo_kwargs={"curriculum": curriculum}, prepare=looks).train()
    assert repr(looks.seen["dpo"]) == repr(curriculum) and looks.seen["dpo"] is not curriculum
    assert looks.seen["ppo"] is None
    with pytest.raises(ValueError, match=r"dpo_kwargs was .*easy_to_hard"):
        short(tmp_path, pairs=None)


@pytest.mark.train
def test_a_round_without_pairs_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(NoPairsError) as caught:
        short(tmp_path, reward_funcs=tiny.constant, rounds=2).train()
    assert f"Round 1 is complete, in {tmp_path}; rounds=1 ends there." in caught.value.__notes__
    assert same(adapter(tmp_path), adapter(tmp_path / "round_1/ppo"))
    assert len(short(tmp_path, reward_funcs=tiny.constant, rounds=1).train()) == 3


@pytest.mark.train
def test_cross_fitted_on_the_same_trunk(tmp_path: Path) -> None:
    """By scorers with DPO's own settings, which are neither evaluated nor saved; the policy stays as it was."""
    args = dpo_args(max_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    looks = Looks(adapter_of)
    run = short(tmp_path, pairs=pairs(60), eval_pairs=pairs(8), dpo_args=args, clean="cross_fitting", prepare=looks)
    run.train()
    assert "60 pairs, by cross-fitting in 5 folds" in (tmp_path / "round_1/pairs/cleaning.txt").read_text()
    assert same(looks.seen["dpo"], adapter(tmp_path / "start"))


def test_reward_weights_of_those_that_judge(tmp_path: Path) -> None:
    """The implicit reward is left out of the rewards that judge pairs, and so is its weight."""
    run = schedule(
        tmp_path,
        reward_funcs=[IMPLICIT_REWARD, tiny.low_ids, tiny.first_token_even],
        policy_args=PPOConfig(
            **policy_settings(
                reward_weights=[0.5, 1.0, 3.0], outcome_reward_funcs=[IMPLICIT_REWARD, "first_token_even"]
            )
        ),
    )
    sampler = run._sampler(tmp_path)
    assert sampler.args.outcome_reward_funcs == ["first_token_even"]
    assert sampler.reward_func_names == ["low_ids", "first_token_even"]
    assert sampler.reward_weights.tolist() == [1.0, 3.0]
    assert run.policy_args.reward_weights == [0.5, 1.0, 3.0]


@pytest.mark.train
def test_the_critic_is_fitted_to_what_pairs_were_made_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """To all completions, with the rewards and weights that judged."""
    args = PPOConfig(**policy_settings(max_steps=2, save_steps=1, reward_weights=[2.0, 0.1]))
    looks = Looks(lambda trainer: getattr(trainer, "critic", None) and trainer.critic.head.out.bias.item())
    settings = {"reward_funcs": [tiny.low_ids, IMPLICIT_REWARD], "pairs": None, "policy_args": args, "fit_critic": 3}
    run = short(tmp_path, prepare=looks, **settings)
    run.train()
    assert looks.seen["ppo"] != 0
    assert "critic fitted to 48 completions in 18 steps" in capsys.readouterr().out
    sampler = run._second_trainer(args, [tiny.low_ids, tiny.first_token_even], {})
    sampler.reward_func_names[1] = IMPLICIT_REWARD
    asked = prompts_of_round(run.train_dataset, run.pair_settings, 1, args.seed)
    found = scored_completions(sampler, asked, tmp_path / "round_1/pairs")
    assert [one.score for one in found] == [pytest.approx(2 * tiny.low_ids([one.completion_ids])[0]) for one in found]
    assert found[0].prompt_ids == tiny.tokenizer()(asked[0]["prompt"])["input_ids"] != found[-1].prompt_ids
