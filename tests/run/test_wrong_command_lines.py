"""
Wrong command lines and yaml files of every recipe: each ends with one line that names what to change, before a model
is loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import quickstart
import tiny

from trl_ext.run import program
from trl_ext.run.catalogue import list_recipes


REWARDS = """
def even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def odd(completion_ids, **kwargs):
    return [float(ids[0] % 2) for ids in completion_ids]
"""
PROMPTS = [{"prompt": f"w{i} w0"} for i in range(16)]
PAIRS = [{"prompt": f"w{i}", "chosen": " w1", "rejected": " w2"} for i in range(16)]
SMALL = "--output_dir out --use_cpu true --report_to none --model_name_or_path model"
SAMPLING = f"{SMALL} --dataset_name prompts.jsonl --reward_funcs rewards.py:even --max_completion_length 4"
OF_PAIRS = f"{SMALL} --dataset_name pairs.jsonl"
# Of each recipe, a command line that is right
TASKS = ("sort_digits", "kind_sentence", "smollm2")
RIGHT = dict.fromkeys(("grpo", "dapo", "dupo", "gspo", "ppo", "vapo", "rloo", "reinforce", "maxrl"), SAMPLING)
RIGHT |= dict.fromkeys(("dpo_then_ppo", "make_pairs", "filter_prompts"), SAMPLING)
RIGHT["dpo_then_ppo"] += " --use_peft true"
RIGHT |= {"dpo": OF_PAIRS, "reward": OF_PAIRS, "sft": OF_PAIRS}
RIGHT |= dict.fromkeys(TASKS, "--output_dir out")
ARGUMENTS = """
grpo         | --lerning_rate 0.1                      | --lerning_rate is no argument of this recipe. Did you mean --learning_rate?
sft          | --batch_size 4                          | --batch_size is no … Did you mean --per_device_train_batch_size … --per_device_eval_batch_size
reinforce    | --Learning-Rates=0.1                    | --Learning-Rates is no argument … Did you mean --learning_rate?
sort_digits  | --sede 1                                | unrecognized arguments: --sede
kind_sentence | --test_size few                        | --test_size is 'few', but takes a whole number
smollm2      | --sede 1                                | unrecognized arguments: --sede
filter_prompts | --drop_unsolve_d                      | Did you mean --drop_unsolved?
dapo         | --max_steps 1 2                         | '2' belongs to no argument. Arguments are written as --name value
rloo         | --learning_rate fast                    | --learning_rate is 'fast', but takes a number
dpo          | --max_steps many                        | --max_steps is 'many', but takes a whole number
gspo         | --use_peft maybe                        | --use_peft: …maybe
vapo         | --max_steps 50                          | critic_warmup_steps=50 leaves none of the 50 optimizer steps to the policy
ppo          | --max_steps                             | --max_steps: expected one argument
sft          | --lr_scheduler_type lineer              | --lr_scheduler_type: invalid choice: 'lineer' (choose from …linear
sort_digits  | --sft_size few                          | --sft_size is 'few', but takes a whole number
dapo         | --loss_type dapoo                       | loss_type='dapoo' is unknown. Choose one of …'dapo'
maxrl        | --scale_rewards group                   | scale_rewards='group' … Set scale_rewards to 'none'
dpo          | --loss_type sigmod                      | loss_type…'sigmod'… Choose …'sigmoid'
dpo_then_ppo | --expect {"reward":{"1":[0,1]}}         | --expect has reward, of no stage. Write dpo/reward or ppo/reward
make_pairs   | --expect {"reward":{"1":[0,1]}}         | --expect compares the logs of a training, and this recipe trains nothing
gspo         | --expect reward                         | --expect is 'reward', which is no JSON
dapo         | --dataset_name reasoning_gym:chain_sun  | --dataset_name is 'reasoning_gym:chain_sun': 'chain_sun' is no task of Reasoning Gym. Did you mean 'chain_sum'?
grpo         | --dataset_name reasoning_gym:n_queens   | the verifier of n_queens runs what the policy writes as Python code
dpo          | --loss_type                             | --loss_type: expected at least one argument
gspo         | --importance_sampling_level word        | importance_sampling_level='word' is unknown
dpo_then_ppo | --method TRPO                           | --method is 'TRPO'. Choose one of PPO, GRPO
dpo_then_ppo | --dpo {"betas":1}                       | --dpo has betas, which DPOConfig doesn't know. Did you mean --beta?
dpo_then_ppo | --dpo {"beta":"high"}                   | --dpo: --beta is 'high', but takes a number
dpo_then_ppo | --pairs {"num":1}                       | pair_settings has ['num']. Choose from
grpo         | --model_name_or_path models             | --model_name_or_path is 'models', no folder in … and on the Hub
dapo         | --model_name_or_path runs/none/sft      | --model_name_or_path is 'runs/none/sft', but there is no such folder in
sft          | --model_name_or_path bare               | --model_name_or_path is 'bare', a folder without config.json
ppo          | --reward_model_name_or_path ./judge     | --reward_model_name_or_path is './judge', but there is no such folder
ppo          | --value_model_name_or_path org/critic   | --value_model_name_or_path is 'org/critic', no folder
ppo          | --reward_model_name_or_path model       | The reward model 'model' is a Qwen2ForCausalLM
grpo         | --dataset_name promts.jsonl             | --dataset_name is 'promts.jsonl', but there is no such file or folder in
make_pairs   | --dataset_name data/none/rows           | --dataset_name is 'data/none/rows', but there is no such file or folder
dupo         | --dataset_name org/none                 | --dataset_name is 'org/none', which can't be loaded: …Hub
dpo          | --dataset_name empty.jsonl              | --dataset_name is 'empty.jsonl', which is an empty file
reward       | --dataset_name blank.jsonl              | --dataset_name is 'blank.jsonl', which can't be loaded
sft          | --dataset_name broken.jsonl             | --dataset_name is 'broken.jsonl', which can't be loaded: …JSON parse error
sft          | --dataset_name rewards.py               | only .json, .jsonl, .csv, .parquet files can be read
dpo          | --dataset_name prompts.jsonl            | split 'train' of prompts.jsonl has no column chosen and no column rejected, only prompt
reward       | --dataset_name prompts.jsonl            | has no column chosen and no column rejected, only prompt
ppo          | --dataset_name text.jsonl               | no column `prompt`, only ['text']
filter_prompts | --dataset_train_split trian           | --dataset_train_split is 'trian', but the data set has only: train
make_pairs   | --prepare_row rewards.py:missing        | --prepare_row is 'rewards.py:missing', but 'missing' is not a function there
rloo         | --prepare_row rewards.py:even           | --prepare_row is 'rewards.py:even', which fails on the rows of prompts.jsonl: TypeError
grpo         | --reward_funcs rewards.py               | names a file and no function. Write one of rewards.py:even, rewards.py:odd
dapo         | --reward_funcs rewards.py:evn           | 'evn' is not a function there. Did you mean 'even'?
dupo         | --reward_funcs syntax.py:f              | running 'syntax.py' fails: SyntaxError
reinforce    | --reward_funcs acuracy_reward           | no reward function of TRL's (did you mean accuracy_reward?)
gspo         | --curriculum_column digits              | curriculum_column is set, but curriculum isn't
ppo          | --ptx_dataset_name text.csv --ptx_coef 1 | --ptx_dataset_name is 'text.csv', but there is no such file
grpo         | --config none.yaml                      | --config is 'none.yaml', which is no file in
dpo          | --config=none.yaml                      | --config is 'none.yaml', which is no file in
sft          | --config                                | --config is followed by no file
ppo          | --config rewards.py                     | 'def even(completion_ids, **kwargs)' in the yaml file is no argument
dapo         | --config prompts.jsonl                  | --config is 'prompts.jsonl', which is no YAML
"""  # noqa: E501
YAML = """
grpo         | lerning_rate: 0.1                       | 'lerning_rate' in the yaml file is no argument … Did you mean --learning_rate?
make_pairs   | stratgy: margin                         | 'stratgy' in the yaml file … Did you mean --strategy?
reward       | learning_rate: fast                     | --learning_rate is 'fast', but takes a number
dapo         | max_steps: 2.5                          | --max_steps is 2.5 in the yaml file, but takes a whole number
dupo         | max_steps: [1, 2]                       | --max_steps is [1, 2] in the yaml file, but takes a whole number
gspo         | learning_rate: true                     | --learning_rate is True in the yaml file, but takes a number
ppo          | reward_weights: [high]                  | --reward_weights is 'high' in the yaml file, but takes a number
sft          | lr_scheduler_type: lineer               | --lr_scheduler_type is 'lineer' in the yaml file. Choose one of linear
rloo         | dataset_name: {a: 1}                    | --dataset_name is {'a': 1} in the yaml file, but takes text
dpo          | just words                              | has no arguments in it
dpo_then_ppo | "dpo: {beta: [1]}"                      | --dpo: --beta is [1] in the yaml file
grpo         | expect: {reward: [0, 1]}                | --expect: reward is [0, 1] (a list). Write bands by step, such as {20: [0.2, 0.5]}
sft          | expect: {loss: {20: [2, 1]}}            | --expect: loss, step 20 is [2, 1]. The lower end comes first
dpo_then_ppo | method: [PPO]                           | --method is
"""  # noqa: E501


def cases(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(" | ")] for line in table.strip().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, data and rewards that are right, and some that aren't."""
    path = tmp_path_factory.mktemp("wrong")
    tiny.qwen2().save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    (path / "bare").mkdir()
    files = {
        name: "".join(f"{json.dumps(row)}\n" for row in rows)
        for name, rows in (("prompts", PROMPTS), ("pairs", PAIRS))
    }
    files |= {"text": '{"text": "w1"}\n', "empty": "", "blank": "\n", "broken": '{"prompt": "w1"}\n{"prompt":\n'}
    for name, text in files.items():
        (path / f"{name}.jsonl").write_text(text)
    (path / "rewards.py").write_text(REWARDS)
    (path / "syntax.py").write_text("def f(:\n")
    datasets.disable_progress_bars()  # which a recipe does in a process of its own
    yield path
    datasets.enable_progress_bars()


def ended(recipe: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a recipe ends."""
    name = f"tasks/{recipe}" if recipe in TASKS else recipe
    with pytest.raises(SystemExit) as end:
        quickstart.start(name, [*RIGHT[recipe].split(), *argv])
    assert end.value.code == program.STATUS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{recipe}.py: error: ")
    return line


def says(line: str, message: str) -> bool:
    """Whether a line has the parts of a message, in order; … stands for what is left out."""
    for part in map(str.strip, message.split("…")):
        _, found, line = line.partition(part)
        if found != part:
            return False
    return True


def test_every_recipe_is_in_the_table():
    named = {recipe for recipe, *_ in [*cases(ARGUMENTS), *cases(YAML)]}
    assert named == set(RIGHT) == {recipe.name for recipe in list_recipes()}
    assert len(cases(ARGUMENTS)) + len(cases(YAML)) >= 60


@pytest.mark.parametrize(("recipe", "argv", "message"), cases(ARGUMENTS))
def test_wrong_arguments(recipe, argv, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    found = ended(recipe, argv.split(), capsys)
    assert says(found, message), found


@pytest.mark.parametrize(("recipe", "text", "message"), cases(YAML))
def test_wrong_yaml_files(recipe, text, message, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    (tmp_path / "a.yaml").write_text(text.strip('"'))
    found = ended(recipe, ["--config", str(tmp_path / "a.yaml")], capsys)
    assert says(found, message), found
