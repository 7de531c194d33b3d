"""Pairs made by hand-made samples, and by a real trainer whose rewards are known."""

import json
import math
import re

import pytest
import tiny
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from trl_ext import GRPOTrainer
from trl_ext.preferences.pairs import NoPairsError, Sample, make_pairs, pair_up


def sample(name: str, *rewards: float, score: float | None = None, ended: bool = True) -> Sample:
    return Sample(name, [5], list(rewards), sum(rewards) if score is None else score, ended, False)


def names(found: list) -> list[tuple[str, str, float]]:
    return [(better.completion, worse.completion, round(gap, 6)) for better, worse, gap in found]


ABC = [sample("a", 0.2), sample("b", 1.0), sample("c", -0.5), sample("d", 1.0)]


def test_best_and_worst():
    assert names(pair_up(ABC)[0]) == [("b", "c", 1.5)]  # of b and d, which are equal, the first
    assert pair_up(ABC, margin=1.5) == ([], "no margin large enough")
    assert pair_up([sample("a", 1.0), sample("b", 1.0)]) == ([], "all scores are equal")
    only_worst_ended = [sample("cut", 1.0, ended=False), sample("ended", 0.0)]
    assert pair_up(only_worst_ended, truncated="reject") == ([], "only a truncated completion was better")


def test_all_pairs_above_a_margin():
    everything = [("b", "c", 1.5), ("d", "c", 1.5), ("a", "c", 0.7), ("b", "a", 0.8), ("d", "a", 0.8)]
    largest_first = sorted(everything, key=lambda pair: -pair[2])
    assert sorted(names(pair_up(ABC, "margin")[0])) == sorted(everything)
    assert names(pair_up(ABC, "margin", margin=0.7)[0]) == largest_first[:4]  # 0.7 itself isn't above it
    assert names(pair_up(ABC, "margin", max_pairs=2)[0]) == largest_first[:2]
    assert pair_up(ABC, "margin", margin=2.0)[1] == "no margin large enough"


def test_a_majority_outvotes_a_sum():
    # Two of three functions prefer a, though the third's number is larger
    one, other = sample("a", 1.0, 1.0, 0.0), sample("b", 0.0, 0.0, 9.0)
    assert names(pair_up([one, other], "majority", judges=[1, 1, 1])[0]) == [("a", "b", round(1 / 3, 6))]
    assert names(pair_up([one, other])[0]) == [("b", "a", 7.0)]  # by their sum it is the other way round
    # Who has no weight has no vote, and a negative weight votes against
    assert pair_up([one, other], "majority", judges=[1, 0, 1]) == ([], "no majority for any pair")
    assert names(pair_up([one, other], "majority", judges=[1, -1, 1])[0]) == [("b", "a", round(1 / 3, 6))]
    # One of three for a, nobody against it: no majority of the functions
    undecided = [sample("a", 1.0, 0.0, 0.0), sample("b", 0.0, 0.0, 0.0)]
    assert pair_up(undecided, "majority", judges=[1, 1, 1]) == ([], "no majority for any pair")
    # A function that doesn't apply doesn't count
    applies = [sample("a", 1.0, math.nan, score=1.0), sample("b", 0.0, 5.0, score=5.0)]
    assert names(pair_up(applies, "majority", judges=[1, 1])[0]) == [("a", "b", 1.0)]


def test_a_truncated_completion_can_only_be_worse():
    found = [sample("cut", 2.0, ended=False), sample("good", 1.0), sample("bad", 0.0)]
    assert names(pair_up(found, truncated="reject")[0]) == [("good", "bad", 1.0)]
    assert names(pair_up(found, "margin", truncated="reject")[0]) == [("good", "bad", 1.0)]
    assert names(pair_up(found)[0]) == [("cut", "bad", 2.0)]
    assert pair_up(found[:2], "margin", truncated="reject") == ([], "only a truncated completion was better")
    worst = [sample("good", 1.0), sample("cut", -1.0, ended=False)]
    assert names(pair_up(worst, truncated="reject")[0]) == [("good", "cut", 2.0)]


def short(completion_ids, **kwargs):
    """Less for every token."""
    return [-float(len(ids)) for ids in completion_ids]


def test_pairs_of_a_policy(tmp_path):
    reward = tiny.Remembering(tiny.low_ids)
    trainer = tiny.trainer(GRPOTrainer, tmp_path, [reward, short], reward_weights=[1.0, 0.25])
    data = tiny.prompts(6)
    pairs, report = make_pairs(trainer, data, num_generations=4, batch_size=4)
    assert len(reward.calls) == 2
    asked = [
        (prompt, text, ids, even - 0.25 * len(ids))
        for call in reward.calls
        for prompt, text, ids, even in zip(
            call.prompts, call.completions, call.completion_ids, call.rewards, strict=True
        )
    ]
    expected = []
    for prompt in data["prompt"]:  # written differently: by the texts that the reward function was shown
        ended = [row for row in asked if row[0] == prompt and row[2][-1] == 2 and not {0, 1, 2, 3} & set(row[2][:-1])]
        best, worst = (
            max(ended, key=lambda row: row[3], default=None),
            min(ended, key=lambda row: row[3], default=None),
        )
        if ended and best[3] > worst[3]:
            expected.append((prompt, best[1], worst[1], best[2], worst[2]))
    columns = ("prompt", "chosen", "rejected", "chosen_sampled_ids", "rejected_sampled_ids")
    assert [tuple(row[column] for column in columns) for row in pairs] == expected
    assert 0 < len(expected) <= 6
    for row in pairs:
        assert row["score_margin"] == pytest.approx(row["score_chosen"] - row["score_rejected"])
        assert row["score_margin"] > 0
        assert data[row["prompt_row"]]["prompt"] == row["prompt"]
    assert report.prompts == 6
    assert report.completions == 24
    assert report.generated_tokens == sum(len(ids) for _, _, ids, _ in asked)
    assert report.truncated == sum(ids[-1] != 2 for _, _, ids, _ in asked)
    assert 0 < report.truncated < 24
    assert report.prompts == report.prompts_with_pairs + sum(report.without_pairs.values())
    assert trainer.state.global_step == 0
    assert "margin" not in pairs.column_names  # which would change the loss of TRL's reward trainer
    again, _ = make_pairs(trainer, data, num_generations=4, batch_size=4)
    assert again.to_list() == pairs.to_list()
    other, _ = make_pairs(trainer, data, num_generations=4, batch_size=4, seed=100)
    assert other.to_list() != pairs.to_list()


def test_a_completion_without_end_is_left_out_unless_asked_for(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.low_ids)
    pairs, report = make_pairs(trainer, tiny.prompts(8), strategy="margin", truncated="keep")
    cut = [row for row in pairs if row["chosen_sampled_ids"][-1] != 2 or row["rejected_sampled_ids"][-1] != 2]
    assert report.truncated_used == len(cut) > 0
    pairs, report = make_pairs(trainer, tiny.prompts(8), strategy="margin", truncated="reject")
    assert all(row["chosen_sampled_ids"][-1] == 2 for row in pairs)
    assert report.truncated_used == sum(row["rejected_sampled_ids"][-1] != 2 for row in pairs) > 0
    pairs, report = make_pairs(trainer, tiny.prompts(8), strategy="margin")
    assert all(row["chosen_sampled_ids"][-1] == row["rejected_sampled_ids"][-1] == 2 for row in pairs)
    assert report.truncated_used == 0
    assert f"{report.truncated} completions: truncated" in re.sub(" +", " ", str(report))


# With what comes before and after an answer in its place, as templates of real models
TURNS = (
    "{% if aloud %}w7 {% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}w0 {{ m['content'] }} <eos>"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}w0 {% endif %}"
)


@pytest.mark.parametrize(("conversational", "template"), [(False, None), (True, None), (True, {"aloud": True})])
def test_dpo_trains_on_exactly_what_was_sampled(conversational, template, tmp_path):
    prompts = tiny.prompts(40, conversational=conversational)
    if not conversational:  # words are split at spaces
        prompts = prompts.map(lambda row: {"prompt": row["prompt"] + " "})
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TURNS
    arguments = {"train_dataset": prompts, "processing_class": tokenizer}
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.low_ids, arguments, chat_template_kwargs=template)
    pairs, report = make_pairs(trainer, prompts)
    assert report.tokenized_differently == 0
    settings = tiny.pair_settings(tmp_path, max_steps=1)
    policy = tmp_path / "policy"  # a folder, of which TRL loads the reference, too
    tiny.qwen2().save_pretrained(policy)
    dpo = DPOTrainer(model=str(policy), args=DPOConfig(**settings), train_dataset=pairs, processing_class=tokenizer)
    for row in dpo.train_dataset:
        assert row["chosen_ids"] == row["chosen_sampled_ids"]
        assert row["rejected_ids"] == row["rejected_sampled_ids"]
        # Two words, what begins an answer, and what the argument adds
        assert len(row["prompt_ids"]) == 2 + conversational + (template is not None)
    dpo.train()
    assert dpo.state.global_step == 1


class Stopped(Exception):
    """What a killed process looks like from inside."""


def test_text_that_reads_otherwise_is_counted(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.low_ids)
    _, report = make_pairs(trainer, tiny.prompts(8))  # "w1 w2" and "w3 w4" make "w1 w2w3 w4"
    assert report.tokenized_differently == report.pairs > 0
    assert "pairs are tokenised differently" in str(report)


def test_nothing_generated_is_lost(tmp_path):
    def run(partial, on_progress=None, settings=None, **arguments):
        reward = tiny.Remembering(tiny.low_ids)
        trainer = tiny.trainer(GRPOTrainer, tmp_path, reward, **(settings or {}))
        found = make_pairs(
            trainer,
            rows,
            batch_size=2,
            seed=3,
            truncated="keep",
            partial_results=partial,
            on_progress=on_progress,
            **arguments,
        )
        return *found, [prompt for call in reward.calls for prompt in call.prompts[::4]]

    def stop_after_four(done: int, prompts: int) -> None:
        if done == 4:
            raise Stopped

    rows, partial = tiny.prompts(7), tmp_path / "deep" / "partial.jsonl"
    whole, report, asked = run(None)
    assert asked == rows["prompt"]
    with pytest.raises(Stopped):
        run(partial, stop_after_four)
    with open(partial, "a") as file:
        file.write('[[["w1 ')  # the process died while it wrote
    rest, continued, asked = run(partial)
    assert asked == rows["prompt"][4:]
    assert rest.to_list() == whole.to_list()
    assert continued == report
    # Another way to pair them generates nothing
    more, _, asked = run(partial, strategy="margin")
    assert asked == []
    assert len(more) > len(whole)
    with pytest.raises(
        ValueError, match=r"partial_results` is .*partial.jsonl, which holds results of a different call"
    ):
        run(partial, num_generations=3)
    for other in ({"generation_kwargs": {"eos_token_id": 9}}, {"chat_template_kwargs": {"think": False}}):
        with pytest.raises(ValueError, match="holds results of a different call"):
            run(partial, settings=other)


def test_a_failing_reward_leaves_finished_batches(tmp_path):
    class FailsLater:
        __name__ = "fails_later"

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, completion_ids, **kwargs):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("the judge is down")
            return tiny.low_ids(completion_ids)

    partial = tmp_path / "partial.jsonl"
    with pytest.raises(Exception, match="the judge is down"):
        make_pairs(
            tiny.trainer(GRPOTrainer, tmp_path, FailsLater()), tiny.prompts(6), batch_size=2, partial_results=partial
        )
    batches = partial.read_text().splitlines()[1:]
    assert len(batches) == 1
    assert len(json.loads(batches[0])) == 2


def test_prompts_without_pairs_are_counted(tmp_path):
    def some(prompts, target, completion_ids, **kwargs):
        """None for a third of the prompts, equal for another."""
        return [
            None if t % 3 == 0 else 1.0 if t % 3 == 1 else sum(ids)
            for t, ids in zip(target, completion_ids, strict=True)
        ]

    trainer = tiny.trainer(GRPOTrainer, tmp_path, some)
    data = tiny.prompts(12)  # targets 4 to 15
    pairs, report = make_pairs(trainer, data, truncated="keep")
    assert {data[row]["target"] % 3 for row in pairs["prompt_row"]} == {2}
    assert report.without_pairs["all scores are equal"] == 4
    # One of them may have said the same in all its samples
    assert report.without_pairs["fewer than two completions with a score"] in (3, 4)
    assert report.prompts == report.prompts_with_pairs + sum(report.without_pairs.values())
    with pytest.raises(NoPairsError, match="No prompt gave a pair") as caught:
        make_pairs(trainer, data, margin=1e6)
    assert sum(caught.value.report.without_pairs.values()) == 12
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_special_tokens_and_repetitions_make_no_pairs(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path, tiny.low_ids)
    # <pad>, <bos> and <unk> in the middle are in no text
    ids = [[4, 1, 5, 2], [4, 5, 2], [4, 5, 2], [6, 2], [7, 2]]
    rows = [[trainer.processing_class.decode(row, skip_special_tokens=True), row, [1.0]] for row in ids]
    rows[3][2], rows[4][2] = [0.5], [None]
    partial = tmp_path / "partial.jsonl"
    with pytest.raises(Stopped):  # to have the file's first line

        def stop(done: int, prompts: int) -> None:
            raise Stopped

        make_pairs(trainer, tiny.prompts(1), 5, partial_results=partial, on_progress=stop)
    partial.write_text(partial.read_text().splitlines()[0] + "\n" + json.dumps([rows]) + "\n")
    pairs, report = make_pairs(trainer, tiny.prompts(1), 5, partial_results=partial)
    assert (pairs["chosen_sampled_ids"][0], pairs["rejected_sampled_ids"][0]) == ([4, 5, 2], [6, 2])
    assert (report.special_tokens_inside, report.repeated, report.not_scored, report.truncated) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "best"}, "strategy='best' is unknown. Choose one of 'best_worst'"),
        ({"truncated": True}, "truncated=True is unknown. Choose one of 'drop'"),
        ({"num_generations": 1}, "`num_generations` is 1, but a pair takes at least 2"),
        ({"margin": -1.0}, "`margin` is -1.0, but the better completion can't score lower"),
        ({"margin": math.nan}, "`margin` is nan"),
        ({"max_pairs": 0}, "`max_pairs` is 0, but it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path)
    with pytest.raises(ValueError, match=message):
        make_pairs(trainer, tiny.prompts(2), **arguments)


def test_bad_data_is_named(tmp_path):
    trainer = tiny.trainer(GRPOTrainer, tmp_path)
    with pytest.raises(TypeError, match="dataset is an IterableDataset"):
        make_pairs(trainer, tiny.prompts(2).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"dataset has 1 rows of \['text'\]\. Pass rows with a column `prompt`"):
        make_pairs(trainer, Dataset.from_dict({"text": ["w1"]}))
    with pytest.raises(ValueError, match="Pairs are made of text"):
        make_pairs(trainer, tiny.prompts(1).add_column("image", ["x"]))


def test_weights_and_judges_decide(tmp_path):
    """A function that only shapes doesn't judge."""
    trainer = tiny.trainer(
        GRPOTrainer,
        tmp_path,
        [tiny.low_ids, short],
        reward_weights=[2.0, 100.0],
        outcome_reward_funcs=["low_ids"],
    )
    pairs, _ = make_pairs(trainer, tiny.prompts(8))
    for row in pairs:
        chosen, rejected = torch.tensor(tiny.low_ids([row["chosen_sampled_ids"], row["rejected_sampled_ids"]])) * 2
        assert row["score_chosen"] == pytest.approx(chosen.item())
        assert row["score_rejected"] == pytest.approx(rejected.item())
