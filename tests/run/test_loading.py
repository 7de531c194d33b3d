"""Functions, rewards, data sets and models by what arguments call them."""

import copy
import os
from dataclasses import replace

import pytest
import tiny
import trl.rewards
from datasets import DatasetDict
from trl import DatasetMixtureConfig, ModelConfig

import trl_ext
from trl_ext.errors import UserError
from trl_ext.rewards.reasoning_gym import reasoning_gym_reward
from trl_ext.run import loading, publishing
from trl_ext.run.arguments import PolicyArguments, PPOArguments


def script(**arguments) -> PolicyArguments:
    return PolicyArguments(**arguments)


def rewards(tmp_path, *names: str, **arguments):
    config = trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path))
    return loading.load_reward_funcs(script(reward_funcs=list(names), **arguments), config)


def test_functions_from_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\ndef one(row):\n    return {'x': 1}\n\nN = 3\n"
    )
    assert loading.load_function(f"{tmp_path}/mine.py:one", "prepare_row")({}) == {"x": 1}
    assert loading.load_function("os.path.join", "prepare_row") is os.path.join
    monkeypatch.chdir(tmp_path)
    assert loading.load_function("mine.one", "prepare_row")({}) == {"x": 1}  # from the working directory
    for spec, message in {
        "missing.py:one": "--prepare_row is 'missing.py:one', but there is no file 'missing.py'",
        "mine.py:two": "'two' is not a function there",
        "mine.N": "'N' is not a function there",
        "nothing.here.f": "importing 'nothing.here' fails",
        "f": "importing '' fails",
    }.items():
        with pytest.raises(ValueError, match=message):
            loading.load_function(spec, "prepare_row")


def test_functions_of_files_beside_the_yaml_file(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.py").write_text("def one(row):\n    return 1\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loading.load_function("mine.py:one", "prepare_row", tmp_path / "a.yaml")({}) == 1
    with pytest.raises(UserError, match=r"there is no file 'mine\.py'"):
        loading.load_function("mine.py:one", "prepare_row")


def test_reward_functions_by_every_name(tmp_path):
    (tmp_path / "model").mkdir()
    found = rewards(
        tmp_path,
        "accuracy_reward",
        "trl.rewards.think_format_reward",
        "recipes/tasks/sort_digits.py:exact_match",
        str(tmp_path / "model"),
        "org/reward-model-v1.5",
        "get_soft_overlong_punishment",
        "reasoning_gym_reward",
        reward_model_name_or_path="reward.model",
    )
    assert found[0] == "reward.model"  # said to be a model, whatever it looks like
    assert found[1:3] == [trl.rewards.accuracy_reward, trl.rewards.think_format_reward]
    assert found[3](completion_ids=[[1], [2]], answer_ids=[[1], [1]]) == [1, 0]
    assert found[4:6] == [str(tmp_path / "model"), "org/reward-model-v1.5"]
    # 6 tokens at most, of which the last fifth, 1, is punished: 5 tokens are free, the 6th costs 1
    assert found[6](completion_ids=[[0] * 5, [0] * 6]) == [0, -1]
    assert found[7] is reasoning_gym_reward


def test_rewards_that_are_learned_later_stay_names(tmp_path):
    config = trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path))
    given = script(reward_funcs=["implicit_reward"])
    assert loading.load_reward_funcs(given, config, learned=["implicit_reward"]) == ["implicit_reward"]
    with pytest.raises(UserError, match="--reward_funcs has 'implicit_reward'"):
        loading.load_reward_funcs(given, config)


def test_unknown_reward_functions_are_named(tmp_path):
    with pytest.raises(ValueError, match="--reward_funcs is missing"):
        rewards(tmp_path)
    with pytest.raises(ValueError, match="--reward_funcs has 'acuracy_reward'"):
        rewards(tmp_path, "acuracy_reward")
    with pytest.raises(ValueError, match=r"importing 'my\.rewards' fails"):
        rewards(tmp_path, "my.rewards.exact")


@pytest.mark.parametrize("form", ["folder", "split", "json", "jsonl", "csv", "parquet"])
def test_data_in_every_form(form, tmp_path):
    rows = tiny.prompts(3)
    path = tmp_path / f"data.{form}"
    if form == "folder":
        DatasetDict(train=rows, test=rows).save_to_disk(path)
    elif form == "split":
        rows.save_to_disk(path)
    else:
        getattr(rows, f"to_{form.removesuffix('l')}")(path)
    data = loading.load_data(script(dataset_name=str(path)), DatasetMixtureConfig())
    assert data["train"]["prompt"] == rows["prompt"]
    assert data["train"]["target"] == rows["target"]
    assert ("test" in data) == (form == "folder")


@pytest.mark.parametrize("told", ["max_terms=2, size=8,test_size=4", '{"max_terms": 2, "size": 8, "test_size": 4}'])
def test_reasoning_gyms_tasks_by_name(told):
    data = loading.load_data(
        script(dataset_name="reasoning_gym:chain_sum,gcd", dataset_config=told),
        DatasetMixtureConfig(),
        ["prompt", "completion"],
    )
    assert data["train"]["task"][:4] == ["chain_sum", "gcd"] * 2 and len(data["test"]) == 4
    assert publishing.on_the_hub("reasoning_gym:chain_sum,gcd") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "reasoning_gym:sums"}, r"--dataset_name is 'reasoning_gym:sums': 'sums' is no task"),
        ({"dataset_config": "max_terms"}, r"--dataset_config is 'max_terms'\. Write settings of .* as max_terms=3"),
        ({"dataset_config": "max_terms=[3"}, r"--dataset_config is 'max_terms=\[3'"),
        ({"dataset_config": "size=many"}, r"--dataset_name is 'reasoning_gym:chain_sum': size is 'many'"),
        ({"dataset_streaming": True}, r"--dataset_streaming doesn't apply to reasoning_gym:chain_sum"),
    ],
)
def test_tasks_and_settings_that_cant_be_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        loading.load_data(script(**{"dataset_name": "reasoning_gym:chain_sum"} | arguments), DatasetMixtureConfig())


def test_mixtures_and_prepared_rows(tmp_path):
    tiny.prompts(3).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "mine.py").write_text("def shout(row):\n    return {'prompt': row['prompt'].upper()}\n")
    mixture = DatasetMixtureConfig(datasets=[{"path": "parquet", "data_files": str(tmp_path / "a.parquet")}])
    data = loading.load_data(script(prepare_row=f"{tmp_path}/mine.py:shout"), mixture)
    assert data["train"]["prompt"] == ["W0 W0", "W1 W0", "W2 W0"]


def test_missing_data_is_named(tmp_path):
    (tmp_path / "data.txt").write_text("w1\n")
    with pytest.raises(ValueError, match="--dataset_name is missing"):
        loading.load_data(script(), DatasetMixtureConfig())
    with pytest.raises(ValueError, match=r"data.txt', but only \.json, \.jsonl, \.csv, \.parquet files"):
        loading.load_data(script(dataset_name=str(tmp_path / "data.txt")), DatasetMixtureConfig())
    tiny.prompts(2).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="--dataset_streaming doesn't apply"):
        loading.load_data(script(dataset_name=str(tmp_path / "saved"), dataset_streaming=True), DatasetMixtureConfig())
    with pytest.raises(ValueError, match="--dataset_train_split is 'trian', but the data set has only: train, test"):
        loading.get_split({"train": 1, "test": 2}, "trian", "dataset_train_split")


def test_a_curriculum_by_schedule_and_column():
    assert loading.load_curriculum(None, None) is None
    found = loading.load_curriculum("mixed", "-margin")
    assert (found.schedule, found.column, found.more_is_easier) == ("mixed", "margin", True)
    with pytest.raises(UserError, match="curriculum_column is set, but curriculum isn't"):
        loading.load_curriculum(None, "margin")


def test_what_trainers_take_leaves_the_arguments_as_they_were(tmp_path):
    args = trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path), model_init_kwargs={"dtype": "float16"})
    before = copy.deepcopy(args.to_dict())
    model_args = ModelConfig("m", model_revision="v1", dtype="float32")
    found = loading.trainer_arguments(script(), args, model_args, {"train": 1, "test": 2})
    assert args.to_dict() == before
    # What is set for the trainer wins over what is set for the model
    assert found["args"].model_init_kwargs == {"revision": "v1", "attn_implementation": None, "dtype": "float16"}
    assert (found["model"], found["train_dataset"], found["eval_dataset"]) == ("m", 1, None)
    args.eval_strategy = "steps"
    assert loading.trainer_arguments(script(), args, model_args, {"train": 1, "test": 2})["eval_dataset"] == 2


def test_a_shared_model_may_be_quantized(tmp_path):
    args = trl_ext.GRPOConfig(**tiny.cpu_settings(tmp_path))
    assert "quantization_config" not in loading.shared_model_settings(args, ModelConfig("m"))
    assert loading.shared_model_settings(args, ModelConfig("m", load_in_4bit=True))["quantization_config"].load_in_4bit


def test_ppo_has_its_reward_model_apart(tmp_path):
    def length(**kwargs):
        return [0.0]

    tiny.prompts(3).rename_column("prompt", "text").to_parquet(tmp_path / "text.parquet")
    given = PPOArguments(reward_model_name_or_path="judge", ptx_dataset_name=str(tmp_path / "text.parquet"))
    found = loading.ppo_arguments(given, ["judge", length])
    assert (found["reward_funcs"], found["reward_model"], found["value_model"]) == ([length], "judge", None)
    assert found["ptx_dataset"]["text"] == ["w0 w0", "w1 w0", "w2 w0"]
    with pytest.raises(UserError, match="--ptx_dataset_split is 'books'"):
        loading.ppo_arguments(replace(given, ptx_dataset_split="books"), [])


def test_a_reward_model_that_is_an_adapter_shares_the_policys_base_if_the_policy_has_one(tmp_path):
    folder, config = tiny.reward_adapter(tmp_path), trl_ext.PPOConfig(**tiny.cpu_settings(tmp_path))
    given = PPOArguments(reward_model_name_or_path=folder, reward_funcs=["trl.rewards.accuracy_reward", folder])
    loaded = loading.load_reward_funcs(given, config, has_adapter=True)
    assert [getattr(func, "adapter", None) for func in loaded] == ["reward", None, "reward_2"]
    assert loading.load_reward_funcs(given, config) == [folder, trl.rewards.accuracy_reward, folder]
    for shares in (True, False):
        found = loading.load_reward_funcs(replace(given, share_reward_base=shares), config, has_adapter=not shares)
        assert isinstance(found[0], trl_ext.AdapterReward) == shares
    # PPO's reward model is last, whether it is a model or an adapter
    apart = loading.ppo_arguments(given, loaded)
    assert (apart["reward_funcs"], apart["reward_model"]) == ([*loaded[1:], loaded[0]], None)
    with pytest.raises(UserError, match=r"--share_reward_base is true, but no reward is the folder of an adapter"):
        loading.load_reward_funcs(script(reward_funcs=["accuracy_reward"], share_reward_base=True), config)
    policy = tiny.get_peft_model(tiny.qwen2(), tiny.lora())
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="has no score head"):
        loading.load_reward_funcs(script(reward_funcs=[str(tmp_path / "policy")]), config, has_adapter=True)
