"""
Tools and environments under selection, in TRL's real tool loop, with a tiny model that is forced to call a tool. What
a tool wrote stays masked, and stays with the rollout that it was written for.
"""

import json
from typing import Any

import pandas
import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_ext import DAPOTrainer, DUPOTrainer, GRPOTrainer


# A call is one word, so that one token makes it; so is what a tool answers
CALLS = [json.dumps({"name": "dice", "arguments": {"sides": sides}}, separators=(",", ":")) for sides in range(4)]
ROLES = ["<user>", "<assistant>", "<tool>", "<end>", "<call>", "</call>"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *tiny.WORDS, *ROLES, *CALLS])}

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<user> {{ m.content }} <end> "
    "{% elif m.role == 'assistant' %}<assistant> {{ m.content }} "
    "{% for c in m.tool_calls or [] %}<call> {{ c.function | tojson }} </call> {% endfor %}<eos> "
    "{% elif m.role == 'tool' %}<tool> {{ m.content }} <end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=TEMPLATE,
    )
    made.response_template = RESPONSE
    return made


class CallsADie(Qwen2ForCausalLM):
    """
    Asked by a user, it calls the die in three of four completions; told what came out, it says one word and ends. Its
    choices are random, its probabilities the model's own.
    """

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        rows = []
        for row in input_ids.tolist():
            word = int(torch.randint(4, 24, ()))
            call = VOCABULARY[CALLS[int(torch.randint(4, ()))]]
            answers = VOCABULARY["<tool>"] in row or torch.rand(()) < 0.25
            said = [word, 2] if answers else [VOCABULARY["<call>"], call, VOCABULARY["</call>"], 2]
            rows.append(row + said + [0] * (4 - len(said)))
        return torch.tensor(rows)


def model() -> CallsADie:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    return CallsADie(config)


def dice(sides: int) -> str:
    """
    Roll a die.

    Args:
        sides: How many.
    """
    return f"w{10 + sides}"


async def slow_dice(sides: int) -> str:
    """
    Roll a die.

    Args:
        sides: How many.
    """
    return dice(sides)


slow_dice.__name__ = "dice"


class Table:
    """An environment with its own die: what it gives depends on where it stands, and it counts."""

    def reset(self, target: int = 0, **kwargs: Any) -> str:
        self.target, self.rolls = target, []
        return " w3"

    def dice(self, sides: int) -> str:
        """
        Roll a die.

        Args:
            sides: How many.
        """
        self.rolls.append(sides)
        return f"w{self.target % 10}"

    def get_reward(self) -> float:
        # Tables of even targets pay by the roll, others always the same
        return float(sum(self.rolls)) if self.target % 2 == 0 else 0.0


def prompts() -> Dataset:
    return tiny.prompts(32, conversational=True)


def run(trainer_class: type, tmp_path: Any, reward: Any, arguments: dict[str, Any], **settings: Any) -> Any:
    given = {"model": model(), "processing_class": tokenizer(), "train_dataset": prompts(), **arguments}
    settings = {"num_generations": 4, "max_completion_length": 16, "max_steps": 3, "seed": 3, **settings}
    return tiny.trained(trainer_class, tmp_path, reward, given, **settings)


def last_word(completions: list[Any], target: list[int], **kwargs: Any) -> list[float]:
    """The number said at the end, for prompts with an even target; 0 for the others."""
    words = [completion[-1]["content"].split() for completion in completions]
    return [float(w[-1][1:]) if w and t % 2 == 0 else 0.0 for w, t in zip(words, target, strict=True)]


def assert_masked(batch: tiny.TrainedBatch) -> None:
    """0 on the tokens from <tool> to the next <assistant>, 1 everywhere else."""
    called = 0
    for ids, mask in zip(batch.completions, batch.output["tool_mask"].tolist(), strict=True):
        inside, expected = False, []
        for token in ids:
            inside = inside or token == VOCABULARY["<tool>"]
            expected.append(0 if inside else 1)
            called += token == VOCABULARY["<tool>"]
            inside = inside and token != VOCABULARY["<assistant>"]
        assert mask[: len(ids)] == expected
    assert called
    written = batch.output["tool_mask"] * batch.output["completion_mask"]
    assert batch.output["num_items_in_batch"] == written.sum()


def tool_words(ids: list[int]) -> list[int]:
    """What tools answered."""
    return [ids[i + 1] for i, token in enumerate(ids) if token == VOCABULARY["<tool>"]]


def calls(ids: list[int]) -> list[int]:
    """The numbers of sides that were asked for."""
    first = VOCABULARY[CALLS[0]]
    return [token - first for token in ids if token >= first]


@pytest.mark.train
class TestTools:
    @pytest.mark.parametrize("tool", [dice, slow_dice], ids=["sync", "async"])
    @pytest.mark.parametrize("trainer_class", [GRPOTrainer, DUPOTrainer, DAPOTrainer])
    def test_tool_tokens_stay_masked(self, tmp_path, trainer_class, tool):
        trainer = run(trainer_class, tmp_path, last_word, {"tools": [tool]})
        for batch in trainer.batches:
            assert_masked(batch)
            for ids in batch.completions:
                # the real tool was called, with the arguments of this completion
                assert tool_words(ids) == [VOCABULARY[dice(sides)] for sides in calls(ids)]
        if trainer_class is DUPOTrainer:
            assert any(batch.selection.sources != [0, 1, 2, 3] for batch in trainer.batches)
        if trainer_class is DAPOTrainer:
            assert any(len(batch.rounds) > 1 for batch in trainer.batches)

    def test_tool_metrics_are_over_all_rounds(self, tmp_path):
        reward = tiny.Remembering(last_word)
        trainer = run(DAPOTrainer, tmp_path, reward, {"tools": [dice]})
        for step, logged in enumerate(tiny.history(trainer)):
            ids = [row for call in reward.at_step(step) for row in call.completion_ids]
            number = sum(len(calls(row)) for row in ids)
            assert logged["tools/call_frequency"] == pytest.approx(number / len(ids))
            assert logged["tools/failure_frequency"] == 0
            written = [len(row) - 4 * len(calls(row)) for row in ids]  # <tool> word <end> <assistant>
            assert logged["completions/mean_length"] == pytest.approx(sum(written) / len(written))

    def test_generated_tokens_are_the_policys(self, tmp_path):
        reward = tiny.Remembering(last_word)
        trainer = run(DAPOTrainer, tmp_path, reward, {"tools": [dice]})
        ids = [row for call in reward.calls for row in call.completion_ids]
        assert trainer.counters.generated_tokens == sum(len(row) - 4 * len(calls(row)) for row in ids)

    def test_table_shows_each_conversation_once(self, tmp_path):
        reward = tiny.Remembering(last_word)
        trainer = run(DUPOTrainer, tmp_path, reward, {"tools": [dice]}, log_completions=True)
        for step in range(len(trainer.batches)):
            table = pandas.read_parquet(f"{tmp_path}/completions/completions_{step + 1:05d}.parquet")
            (call,) = reward.at_step(step)
            assert [row[0]["content"] for row in table["prompt"]] == [row[0]["content"] for row in call.prompts]
            shown = [[message["content"] for message in row] for row in table["completion"]]
            assert shown == [[message["content"] for message in row] for row in call.completions]


class TestEnvironments:
    @pytest.mark.train
    @pytest.mark.parametrize("trainer_class", [DUPOTrainer, DAPOTrainer])
    def test_each_rollout_keeps_its_own(self, tmp_path, trainer_class):
        trainer = run(trainer_class, tmp_path, None, {"environment_factory": Table})
        assert trainer.reward_func_names == ["Table"]
        copied = rounds = 0
        for batch in trainer.batches:
            assert_masked(batch)
            rounds += len(batch.rounds) - 1
            copied += any(source != slot for slot, source in enumerate(batch.selection.sources))
            targets = [r.row["target"] for scored in batch.rounds for r in scored.rollouts]
            completions = [r.completion_ids for scored in batch.rounds for r in scored.rollouts]
            rewards = torch.cat([scored.rewards for scored in batch.rounds])[:, 0].tolist()
            for target, ids, reward in zip(targets, completions, rewards, strict=True):
                # The table that answered is the one that was reset for this row, and the one that was scored
                assert tool_words(ids) == [VOCABULARY[f"w{target % 10}"]] * len(calls(ids))
                assert reward == (sum(calls(ids)) if target % 2 == 0 else 0)
            # What is trained on is what was generated, whole groups of live ones
            known = {(t, tuple(ids)): r for t, ids, r in zip(targets, completions, rewards, strict=True)}
            if any(batch.selection.live):
                for start in range(0, 16, 4):
                    group = {tuple(ids) for ids in batch.completions[start : start + 4]}
                    assert len({r for (_, ids), r in known.items() if ids in group}) > 1
        assert rounds if trainer_class is DAPOTrainer else copied

    @pytest.mark.train
    def test_observations_are_in_the_prompts(self, tmp_path):
        trainer = run(DAPOTrainer, tmp_path, None, {"environment_factory": Table})
        observed = VOCABULARY["w3"]
        for batch in trainer.batches:
            assert all(prompt[-3] == observed for prompt in batch.prompts)  # … w3 <end> <assistant>

    @pytest.mark.train
    def test_environments_that_own_the_data(self, tmp_path):
        data = Dataset.from_dict({"target": [4 + i % 20 for i in range(32)]})
        trainer = run(DUPOTrainer, tmp_path, None, {"environment_factory": Table, "train_dataset": data})
        assert any(batch.selection.sources != [0, 1, 2, 3] for batch in trainer.batches)

    @pytest.mark.train
    def test_rows_without_prompts_are_refilled_by_what_tells_them_apart(self, tmp_path):
        data = Dataset.from_dict({"environment": ["table"] * 32, "target": range(32)})
        arguments = {"environment_factory": {"table": Table}, "train_dataset": data}
        trainer = run(DAPOTrainer, tmp_path, None, arguments)
        drawn = [
            [rollout.row["target"] for rollout in scored.rollouts[::4]]
            for batch in trainer.batches
            for scored in batch.rounds[1:]
        ]
        assert drawn  # further rounds, in which only even targets are of use
        for batch in trainer.batches:
            targets = [rollout.row["target"] for scored in batch.rounds for rollout in scored.rollouts[::4]]
            assert len(set(targets)) == len(targets)

    @pytest.mark.train
    def test_several_kinds(self, tmp_path):
        class Other(Table):
            def dice(self, sides: int) -> str:
                """
                Roll another die.

                Args:
                    sides: How many.
                """
                self.rolls.append(sides)
                return "w19"

            def get_reward(self) -> float:
                return float(-sum(self.rolls))

        data = prompts()
        data = data.add_column("environment", ["table" if i % 2 else "other" for i in range(len(data))])
        arguments = {"environment_factory": {"table": Table, "other": Other}, "train_dataset": data}
        trainer = run(DUPOTrainer, tmp_path, None, arguments)
        assert trainer.reward_func_names == ["Other", "Table"] or trainer.reward_func_names == ["Table", "Other"]
        for batch in trainer.batches:
            (scored,) = batch.rounds
            for rollout, rewards in zip(scored.rollouts, scored.rewards.tolist(), strict=True):
                ids, kind = rollout.completion_ids, rollout.row["environment"]
                applies = trainer.reward_func_names.index(kind.capitalize())
                assert rewards[1 - applies] != rewards[1 - applies]  # NaN: scored by its own kind only
                if kind == "other":
                    assert tool_words(ids) == [VOCABULARY["w19"]] * len(calls(ids))
                    assert rewards[applies] == -sum(calls(ids))
        assert any(batch.selection.sources != [0, 1, 2, 3] for batch in trainer.batches)

    @pytest.mark.train
    def test_rewards_beside_the_environments(self, tmp_path):
        trainer = run(DAPOTrainer, tmp_path, last_word, {"environment_factory": Table}, outcome_reward_funcs=["Table"])
        assert trainer.reward_func_names == ["last_word", "Table"]
        assert trainer.is_outcome.tolist() == [False, True]

    def test_overlong_punishment_beside_the_environments_own_reward(self, tmp_path):
        # Asked for, it must not be left out in silence because no reward function was passed
        trainer = run(DAPOTrainer, tmp_path, None, {"environment_factory": Table}, soft_punish_cache=10, max_steps=1)
        assert trainer.reward_func_names == ["soft_overlong_punishment_reward", "Table"]

    def test_an_environments_own_reward_can_be_called_by_hand(self, tmp_path):
        trainer = run(DAPOTrainer, tmp_path, None, {"environment_factory": Table}, max_steps=1)
        tables = [Table(), Table()]
        for target, table in enumerate(tables):
            table.reset(target)
            table.rolls += [3, 2]
        assert trainer.reward_funcs[0](environments=tables) == trainer.reward_funcs[0](tables) == [5.0, 0.0]

    def test_unknown_outcome_name(self, tmp_path):
        with pytest.raises(ValueError, match=r"'Tables', but the reward functions are .*Table"):
            run(DUPOTrainer, tmp_path, None, {"environment_factory": Table}, outcome_reward_funcs=["Tables"])

    def test_rolling_out_without_training(self, tmp_path):
        trainer = run(DUPOTrainer, tmp_path, None, {"environment_factory": Table}, max_steps=1)
        rows = [prompts()[i] for i in range(3)]
        scored = trainer.roll_out(rows, num_generations=4, seed=0)
        for rollout, reward in zip(scored.rollouts, scored.rewards.flatten().tolist(), strict=True):
            expected = sum(calls(rollout.completion_ids)) if rollout.row["target"] % 2 == 0 else 0
            assert reward == expected
        written = [len(r.completion_ids) - 4 * len(calls(r.completion_ids)) for r in scored.rollouts]
        assert scored.generated_tokens == sum(written)
