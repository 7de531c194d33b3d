"""The recipes and their configurations: short, without logic, understood, and found."""

import ast

import pytest
import quickstart
from trl import ModelConfig, RewardConfig, SFTConfig

import trl_ext
from trl_ext.run import arguments, loading, stages
from trl_ext.run.catalogue import list_recipes


RECIPES = quickstart.RECIPES
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
CONFIG_CLASSES = {
    name.lower(): getattr(trl_ext, f"{name}Config") for name in ("GRPO", "RLOO", "DAPO", "DUPO", "GSPO", "PPO", "VAPO")
}
CONFIG_CLASSES |= {"reinforce": trl_ext.GRPOConfig, "maxrl": trl_ext.GRPOConfig}
# With arguments of their own
SUPERVISED = {
    "pairs": (arguments.PairArguments, trl_ext.GRPOConfig),
    "filter": (arguments.FilterArguments, trl_ext.GRPOConfig),
    "sft": (arguments.DataArguments, SFTConfig),
    "reward": (arguments.DataArguments, RewardConfig),
    "dpo": (arguments.DPOArguments, trl_ext.DPOConfig),
    "hybrid": (arguments.HybridArguments, trl_ext.PPOConfig),
}


def parse(*argv: str, config_class=trl_ext.GRPOConfig):
    return arguments.parse_arguments(arguments.PolicyArguments, config_class, list(argv))


def test_recipes_are_short():
    for path in RECIPES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_recipes_have_no_logic():
    """A docstring, imports, and what is called when the file is run."""
    for path in RECIPES.glob("*.py"):
        docstring, *statements = ast.parse(path.read_text()).body
        kinds = [type(statement) for statement in statements]
        assert isinstance(docstring, ast.Expr), path.name
        assert set(kinds) <= {ast.Import, ast.ImportFrom, ast.If} and kinds.count(ast.If) == 1, path.name
        assert all(isinstance(statement, ast.Assign | ast.Expr) for statement in statements[-1].body), path.name


def test_every_configuration_belongs_to_a_recipe():
    named = {name for recipe in list_recipes() for name in recipe.configs}
    assert named == {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_understood(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    method = path.stem.removeprefix("quickstart_").removeprefix("smoke_").split("_")[0]
    if method in SUPERVISED:
        parsed = arguments.parse_arguments(*SUPERVISED[method], ["--config", str(path)])
        if method == "hybrid":
            stage = stages.preference_stage(parsed[0], parsed[1], {})
            assert stage["dpo_args"].output_dir == parsed[1].output_dir
    else:
        parsed = parse("--config", str(path), config_class=CONFIG_CLASSES[method])
        watched = parsed[1].reward_weights or [1.0]
        assert len(loading.load_reward_funcs(parsed[0], parsed[1])) == len(watched)
        if parsed[0].prepare_row is not None:
            assert callable(loading.load_function(parsed[0].prepare_row, "prepare_row"))
    assert parsed[2].model_name_or_path and parsed[0].dataset_name


def test_the_tutorials_numbers_are_in_one_file(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    _, args, _, _ = parse("--config", "recipes/configs/ppo_tutorial.yaml", config_class=trl_ext.PPOConfig)
    assert (args.epsilon, args.gamma, args.lam, args.vf_coef, args.entropy_coef) == (0.2, 0.99, 0.95, 0.5, 0.01)
    usual = trl_ext.PPOConfig(output_dir="out", use_cpu=True, bf16=False)
    assert (usual.epsilon, usual.gamma, usual.lam, usual.vf_coef, usual.entropy_coef) == (0.2, 1.0, 0.95, 0.1, 0.0)


def test_dpos_tutorial_says_where_it_leaves_the_defaults(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    path = "recipes/configs/dpo_tutorial.yaml"
    _, args, model_args, _ = arguments.parse_arguments(*SUPERVISED["dpo"], ["--config", path])
    usual, usual_model = trl_ext.DPOConfig(output_dir="out", use_cpu=True, bf16=False), ModelConfig()
    assert (args.beta, args.learning_rate, model_args.use_peft) == (0.1, 5e-6, True)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    # What the comments say of the defaults
    assert (usual.beta, usual.learning_rate, usual.num_train_epochs, usual.warmup_steps) == (0.1, 1e-6, 3, 0)
    assert (usual.per_device_train_batch_size, usual.gradient_accumulation_steps, usual.max_length) == (8, 1, 1024)
    assert (usual.lr_scheduler_type, usual.eval_strategy, usual.label_smoothing) == ("linear", "no", 0)
    assert (usual_model.use_peft, usual_model.lora_r, usual_model.lora_alpha) == (False, 16, 32)
    assert usual_model.lora_dropout == 0.05 and usual.disable_dropout
