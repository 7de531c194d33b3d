"""Scripts that were written for TRL 1.12: they run to their end, and every name means what it meant."""

import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from processes import run
from safetensors.torch import load_file
from trainers.test_ppo import Weights, as_ids, classifier
from trainers.test_ppo_config import config
from transformers import HfArgumentParser, Qwen2ForSequenceClassification
from trl import TrlParser

import trl_ext
from trl_ext import PPOConfig, PPOTrainer
from trl_ext.trainers.trl_1_12 import DROPPED, RENAMED, TRL112Arguments, completions_table, report_completions


# Whole scripts


# The shape of 1.12's two examples; they differ in how they are called
SCRIPT = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, ScriptArguments, get_peft_config
from trl_ext import PPOConfig, PPOTrainer

if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    scores = [
        AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1)
        for _ in ("value", "reward")
    ]
    policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
    peft_config = get_peft_config(model_args)
    ref_policy = None
    if peft_config is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)

    def tokenize(row):
        input_ids = tokenizer(row["prompt"], padding=False)["input_ids"]
        return {"input_ids": input_ids, "lengths": len(input_ids)}

    data = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    data = data.map(tokenize, remove_columns=data.column_names, num_proc=training_args.dataset_num_proc)
    train_dataset, eval_dataset = data.select(range(24)), data.select(range(24, 32))

    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=scores[1],
        value_model=scores[0],
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    trainer.generate_completions()
"""

SHAPES = {
    "ppo.py": "--missing_eos_penalty 1.0 --total_episodes 16 --num_ppo_epochs 2 --num_mini_batches 1 "
    "--local_rollout_forward_batch_size 1",
    "ppo_tldr.py": "--missing_eos_penalty 1.0 --total_episodes 8 --stop_token eos --response_length 5 "
    "--eval_strategy steps --eval_steps 1 --use_peft --dataset_num_proc 1",
}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A tokenizer, a policy, a reward model and prompts, as a script would load them."""
    root = tmp_path_factory.mktemp("scripts")
    tiny.tokenizer().save_pretrained(root / "tokenizer")
    policy = tiny.qwen2(vocab_size=32)  # with room for the padding token that the scripts add
    policy.save_pretrained(root / "policy")
    policy.config.num_labels = 1
    torch.manual_seed(1)
    Qwen2ForSequenceClassification(policy.config).save_pretrained(root / "reward")
    (root / "prompts").mkdir()
    tiny.prompts(32).to_json(root / "prompts" / "train.jsonl")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_script_runs_to_its_end(shape, on_disk, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT, encoding="utf-8")
    words = f"--dataset_name {on_disk}/prompts --dataset_train_split train --output_dir {out} "
    words += f"--model_name_or_path {on_disk}/tokenizer --sft_model_path {on_disk}/policy "
    words += f"--reward_model_path {on_disk}/reward --per_device_train_batch_size 2 --gradient_accumulation_steps 4 "
    words += "--learning_rate 1e-2 --logging_steps 1 --use_cpu --bf16 False --report_to none --disable_tqdm True "
    said = run([script, *words.split(), *SHAPES[shape].split()], {"COLUMNS": "120"})
    adapted = "--use_peft" in SHAPES[shape]
    assert (out / ("adapter_model.safetensors" if adapted else "model.safetensors")).is_file()
    critic = load_file(out / "critic" / "critic.safetensors")
    before = load_file(on_disk / "reward" / "model.safetensors")["score.weight"]
    assert not torch.equal(critic["score.weight"], before)  # the value model was trained
    assert "'objective/rlhf_reward'" in said and "'loss/value_avg'" in said
    assert all(word in said for word in ("Prompt", "Completion", "Score", "w4 w1"))
    # What the script reads itself is no mistake of its author's
    for name in ("sft_model_path", "reward_model_path", "dataset_num_proc"):
        assert name not in said


@pytest.mark.train
@pytest.mark.parametrize(
    ("settings", "steps", "generations"),
    [
        # 8 completions a batch: mini-batches × epochs steps each
        ({"num_ppo_epochs": 2, "total_episodes": 16}, 4, 2),
        ({"num_ppo_epochs": 2, "total_episodes": 16, "num_mini_batches": 2}, 8, 2),
        ({"num_ppo_epochs": 1, "total_episodes": 8, "num_mini_batches": 4}, 4, 1),
    ],
)
def test_arguments_of_trl_1_12_train(settings, steps, generations, tmp_path):
    made = PPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        response_length=5,
        kl_coef=0.1,
        cliprange=0.1,
        cliprange_value=0.3,
        vf_coef=0.2,
        whiten_rewards=True,
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=0.7,
        logging_steps=1,
        **settings,
    )
    before = made.to_dict()
    trainer = tiny.recorded(PPOTrainer)(
        args=made,
        processing_class=tiny.tokenizer(),
        model=tiny.stopping(),
        ref_model=tiny.stopping(),
        reward_model=classifier(4),
        value_model=classifier(5),
        train_dataset=as_ids(),
        eval_dataset=as_ids(8),
    )
    weights = Weights()
    trainer.add_callback(weights)
    trainer.train()
    assert trainer.state.global_step == steps
    assert len(trainer.batches) == generations
    assert all(len(batch.completions) == 8 for batch in trainer.batches)
    assert all(len(ids) <= 5 for batch in trainer.batches for ids in batch.completions)
    assert weights.moved(critic=True) == weights.moved(critic=False) == [True] * steps
    logged = {key for log in trainer.state.log_history for key in log}
    assert {"objective/kl", "objective/scores", "objective/rlhf_reward", "loss/policy_avg", "loss/value_avg"} <= logged
    assert {"policy/approxkl_avg", "val/clipfrac_avg", "val/ratio"} <= logged
    # The value model makes the critic a model, in the trainer's configuration and not in the user's
    assert (trainer.args.critic, trainer.args.critic_learning_rate) == ("model", 1e-3)
    assert made.critic == "head" and made.to_dict() == before


# Completions to look at


class FakeTracker(ModuleType):
    """Stands for wandb or trackio: keeps what is logged. Without an open run, trackio raises."""

    def __init__(self, name: str, is_open: bool) -> None:
        super().__init__(name)
        self.run: Any = object() if is_open else None
        self.logged: list[dict[str, Any]] = []

    @staticmethod
    def Table(dataframe: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = dataframe.to_dict("records")
        return rows

    def log(self, values: dict[str, Any]) -> None:
        if self.run is None:
            raise RuntimeError("Call trackio.init() before trackio.log()")
        self.logged.append(values)


def shown(tmp_path: Any, eval_dataset: Any, reward: Any = tiny.hashed, **settings: Any) -> Any:
    settings = {"num_generations": 1, "per_device_eval_batch_size": 3, "reward_weights": [2.0, 1.0], **settings}
    return tiny.trainer(PPOTrainer, tmp_path, [reward, tiny.low_ids], {"eval_dataset": eval_dataset}, **settings)


@pytest.mark.parametrize("of_several", [False, True])
@pytest.mark.parametrize(("sampling", "count"), [(False, 8), (True, 3)])
def test_completions_for_all_prompts_or_one_batch_of_them(sampling, count, of_several, tmp_path):
    data, reward = tiny.prompts(8), tiny.Remembering(tiny.hashed)
    several = {"a": data.select(range(5)), "b": data.select(range(5, 8))}
    trainer = shown(tmp_path, several if of_several else data, reward)
    table = completions_table(trainer, trainer.eval_dataset, sampling)
    assert list(table) == ["prompt", "completion", "score"]
    assert table["prompt"] == data["prompt"][:count]
    assert table["completion"] == [text for call in reward.calls for text in call.completions]
    ids = [ids for call in reward.calls for ids in call.completion_ids]
    expected = [2 * a + b for a, b in zip(tiny.hashed(ids), tiny.low_ids(ids), strict=True)]
    assert table["score"] == pytest.approx(expected, rel=1e-5) and len(set(expected)) > 1


def test_each_batch_of_completions_is_sampled_with_a_seed_of_its_own(tmp_path):
    data = Dataset.from_dict({"prompt": ["w4 w1"] * 6, "target": [4] * 6})
    texts = completions_table(shown(tmp_path, data), data, sampling=False)["completion"]
    assert texts[:3] != texts[3:]


def test_showing_completions_leaves_no_trace_in_a_run(tmp_path, capsys):
    trainer = shown(tmp_path, tiny.prompts(4), max_steps=1)
    trainer.train()
    states, metrics = torch.get_rng_state(), {name: dict(found) for name, found in trainer._metrics.items()}
    before = tiny.weights(trainer.model)
    capsys.readouterr()
    trainer.generate_completions()
    said = capsys.readouterr().out
    assert all(word in said for word in ("Prompt", "Completion", "Score", "Step 1"))
    assert torch.equal(torch.get_rng_state(), states)
    assert {name: dict(found) for name, found in trainer._metrics.items()} == metrics
    assert trainer.model.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trainer.generate_completions()  # the same seeds
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("is_open", [True, False])
def test_completions_go_to_the_trackers_that_have_an_open_run(is_open, tmp_path, monkeypatch):
    trackers = {name: FakeTracker(name, is_open) for name in ("wandb", "trackio")}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    table = {"prompt": ["w0", "w1"], "completion": ["w2 w3", "w4"], "score": [0.5, 1.5]}
    args = config(output_dir=str(tmp_path))
    args.report_to = ["wandb", "trackio"]
    report_completions(args, 3, table)
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    for tracker in trackers.values():
        assert tracker.logged == [{"completions": rows}] * is_open


def test_without_prompts_to_show_them_for_a_script_goes_on(tmp_path, caplog, capsys):
    shown(tmp_path, None).generate_completions()
    assert "generate_completions() shows completions for eval_dataset, and there is none" in caplog.text
    assert "Completion" not in capsys.readouterr().out


def test_prompts_that_are_ids_are_shown_as_text(tmp_path):
    made = config(output_dir=str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=8)
    trainer = PPOTrainer(
        args=made,
        processing_class=tiny.tokenizer(),
        model=tiny.stopping(),
        reward_model=classifier(4),
        train_dataset=as_ids(),
        eval_dataset=as_ids(8),
    )
    table = completions_table(trainer, trainer.eval_dataset, sampling=False)
    assert table["prompt"] == [tiny.tokenizer().decode(ids) for ids in as_ids(8)["input_ids"]]


# Names


def test_names_of_trl_1_12():
    made = config(num_ppo_epochs=2, response_length=53, cliprange=0.3)
    assert (made.num_iterations, made.max_completion_length, made.epsilon) == (2, 53, 0.3)


def test_both_names_with_the_same_value():
    assert config(num_ppo_epochs=2, num_iterations=2).num_iterations == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("local_rollout_forward_batch_size", 64, "per_device_train_batch_size"),
        ("num_sample_generations", 10, "log_completions"),
        ("model_adapter_name", "a", "`default`"),
        ("ref_adapter_name", "a", "reference"),
    ],
)
def test_what_has_no_effect_any_more_says_so(name, value, said, caplog):
    config(**{name: value})
    assert f"{name} has no effect" in caplog.text and said in caplog.text


def test_what_scripts_read_themselves_is_accepted_in_silence(caplog):
    made = config(sft_model_path="a", reward_model_path="b", dataset_num_proc=2)
    assert (made.sft_model_path, made.reward_model_path, made.dataset_num_proc) == ("a", "b", 2)
    assert "_path" not in caplog.text and "dataset_num_proc" not in caplog.text


OWN = {f.name for f in fields(TRL112Arguments)} - {f.name for f in fields(trl_ext.GRPOConfig)}


def test_every_name_has_a_line_in_the_docstring():
    assert {*RENAMED, *DROPPED, "total_episodes", "num_mini_batches", "stop_token", "sft_model_path"} <= OWN
    for name in OWN:
        assert name in (TRL112Arguments.__doc__ or ""), name


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_help_lists_none_of_them_and_the_command_line_takes_all(parser_class, tmp_path):
    parser = parser_class(PPOConfig)
    words = parser.format_help().replace("[", " ").replace("]", " ").split()
    assert "--epsilon" in words and "--kl_coef" in words and "--cliprange_value" in words
    for name in OWN:
        assert f"--{name}" not in words and f"--{name.replace('_', '-')}" not in words
    given = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--report_to", "none"]
    (made,) = parser.parse_args_into_dataclasses([*given, "--cliprange", "0.1", "--stop-token-id", "5"])
    assert (made.epsilon, made.stop_token_id) == (0.1, 5)
    if parser_class is TrlParser:
        (tmp_path / "ppo.yaml").write_text("cliprange: 0.1\nnum_ppo_epochs: 2\n", encoding="utf-8")
        (made,) = parser_class(PPOConfig).parse_args_and_config([*given, "--config", str(tmp_path / "ppo.yaml")])
        assert (made.epsilon, made.num_iterations) == (0.1, 2)


REFUSED = {
    "two names": ({"num_ppo_epochs": 2, "num_iterations": 3}, "num_ppo_epochs=2 and num_iterations=3"),
    "two lengths": ({"response_length": 53, "max_completion_length": 64}, "set the same thing. Set one of them"),
    "two clips": ({"cliprange": 0.1, "epsilon": 0.3}, r"cliprange=0\.1 and epsilon=0\.3"),
    "two splits": ({"num_mini_batches": 2, "steps_per_generation": 4}, "both split a generation batch"),
    "an odd split": (
        {"num_mini_batches": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        "num_mini_batches=3 divides neither",
    ),
    "stop_token": ({"stop_token": "period"}, "stop_token='period' is unknown. Choose 'eos', or set stop_token_id"),
    "two stops": ({"stop_token": "eos", "stop_token_id": 5}, "both end completions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_configuration_refuses(name):
    settings, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        config(**settings)


@pytest.mark.parametrize(
    ("rows", "accumulation", "mini_batches", "expected"),
    [
        # (rows of a micro-batch, micro-batches of a step, micro-batches of a generation)
        (4, 8, 1, (4, 8, 8)),
        (4, 8, 2, (4, 4, 8)),
        (4, 8, 8, (4, 1, 8)),
        (8, 1, 4, (2, 1, 4)),
        (8, 1, 1, (8, 1, 1)),
    ],
)
def test_mini_batches(rows, accumulation, mini_batches, expected):
    made = config(
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, num_mini_batches=mini_batches
    )
    assert (
        made.per_device_train_batch_size,
        made.gradient_accumulation_steps,
        made.steps_per_generation,
    ) == expected
    assert made.generation_batch_size == rows * accumulation


@pytest.mark.parametrize(
    ("episodes", "mini_batches", "epochs", "steps"),
    [
        # 32 completions a batch; updates a batch are mini-batches × epochs
        (64, 1, 4, 2 * 4),
        (65, 1, 4, 3 * 4),
        (64, 4, 2, 2 * 8),
        (1, 2, 1, 2),
    ],
)
def test_episodes(episodes, mini_batches, epochs, steps):
    made = config(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        total_episodes=episodes,
        num_mini_batches=mini_batches,
        num_ppo_epochs=epochs,
    )
    assert made.max_steps == steps


def test_tokens_that_end_a_completion():
    """What becomes of them is in `test_sampling.py`."""
    assert config(stop_token_id=7).stop_token_id == 7
    assert config(stop_token="eos").stop_token_id is None
