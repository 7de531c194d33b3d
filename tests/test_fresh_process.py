"""
Everything of the public API that is constructed, constructed in a process of its own in which Accelerate has no state
yet, as in a user's script. Under pytest an earlier test has made that state, without which Accelerate's logger raises.
"""

import re
from pathlib import Path

import pytest
import tiny
from processes import run

import trl_ext


PRELUDE = """
import accelerate, tiny, trl_ext
from trl_ext import *

def config(kind, **settings):
    return kind(output_dir="out", use_cpu=True, bf16=False, **settings)

assert accelerate.PartialState._shared_state == {}, "there is a state already"
"""
CASES = {
    "GRPOConfig": "config(GRPOConfig)",
    "DAPOConfig": "config(DAPOConfig)",
    "DUPOConfig": "config(DUPOConfig)",
    "GSPOConfig": "config(GSPOConfig)",
    "PPOConfig": "config(PPOConfig)",
    "VAPOConfig": "config(VAPOConfig, critic_warmup_steps=0)",
    "DPOConfig": "config(DPOConfig)",
    "RLOOConfig": "config(RLOOConfig, reward_clip_range=[0, 1])",
    # What these have to say is logged where a configuration is made
    "GRPOConfig with TRL's clip": 'config(GRPOConfig, importance_sampling_level="sequence")',
    "PPOConfig with a name of TRL 1.12": "config(PPOConfig, num_ppo_epochs=2)",
    "PPOConfig with what TRL 1.12 took for a script": 'config(PPOConfig, sft_model_path="m", reward_model_path="r")',
    "PPOConfig of TRL's configuration": "import trl; PPOConfig.adopt(config(trl.GRPOConfig, beta=0.1))",
    "GRPOTrainer": "tiny.trainer(GRPOTrainer, 'out')",
    "DAPOTrainer": "tiny.trainer(DAPOTrainer, 'out', soft_punish_cache=2)",
    "DUPOTrainer": "tiny.trainer(DUPOTrainer, 'out')",
    "GSPOTrainer": "tiny.trainer(GSPOTrainer, 'out')",
    "GSPOTrainer by token": "tiny.trainer(GSPOTrainer, 'out', importance_sampling_level='sequence_token')",
    "RLOOTrainer": "tiny.trainer(RLOOTrainer, 'out', beta=0.0)",
    "RLOOTrainer with TRL's configuration": """
import trl
arguments = {"train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()}
RLOOTrainer(tiny.stopping(), tiny.low_ids, args=trl.RLOOConfig(**tiny.cpu_settings("out", beta=0.0)), **arguments)
""",
    "PPOTrainer": "tiny.trainer(PPOTrainer, 'out')",
    "PPOTrainer with a value model": "tiny.trainer(PPOTrainer, 'out', arguments={'value_model': tiny.classifier()})",
    "VAPOTrainer": "tiny.trainer(VAPOTrainer, 'out', critic_warmup_steps=1)",
    "DPOTrainer": """
from distributed.dpo_worker import recorded, pairs
recorded("out", pairs(hard=list(range(16))), DifficultyCurriculum("easy_to_hard", "hard"))
""",
    "DPOThenPPO": """
from pipelines.dpo_then_ppo_worker import schedule
schedule("out")
""",
    "DifficultyCurriculum": """
curriculum = DifficultyCurriculum("mixed", start_completion_length=2)
tiny.trainer(GRPOTrainer, "out", arguments={"curriculum": curriculum})
""",
    "HealthChecks": "HealthChecks(stop=True)",
    "WasteCallback": """
import trl
arguments = {"train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()}
args = trl.GRPOConfig(**tiny.cpu_settings("out"))
WasteCallback(trl.GRPOTrainer(tiny.stopping(), tiny.low_ids, args=args, **arguments))
""",
    "ObjectiveSchedule": "ObjectiveSchedule([(0.0, 1.0), (1.0, 0.0)])",
    "RewardConstraint": "RewardConstraint('low_ids', floor=0.5, learning_rate=0.1)",
    "RewardObjectives": """
objectives = RewardObjectives({"low_ids": ObjectiveSchedule([(0.0, 1.0), (1.0, 0.0)])})
objectives.attach(tiny.trainer(GRPOTrainer, "out", [tiny.low_ids, tiny.hashed]))
""",
    "AdapterReward": """
from pathlib import Path
AdapterReward(tiny.reward_adapter(Path("out")))
""",
    "ServiceReward": "ServiceReward(tiny.hashed, retries=2)",
    "ImplicitReward": "ImplicitReward(tiny.qwen2(), tiny.qwen2(1), 0.1, tiny.tokenizer())",
}
# Functions, which get a trainer or a model that is there, and errors
NOT_CONSTRUCTED = {"export_role", "load_critic", "make_pairs", "verify", "NonFiniteLossError", "RewardFunctionError"}


def test_nothing_of_the_public_api_is_left_out():
    constructed = {re.split(r"\W", name)[0] for name in CASES}
    assert constructed | NOT_CONSTRUCTED == set(trl_ext.__all__)
    assert not constructed & NOT_CONSTRUCTED


@pytest.mark.parametrize("name", CASES)
def test_it_is_constructed_where_accelerate_has_no_state(name: str, tmp_path: Path) -> None:
    run(["-c", PRELUDE + CASES[name]], cwd=tmp_path)


# All that the package imports is there; of the package itself, nothing
IMPORTS = """
import importlib, sys, traceback
for name in sys.argv[1:]:
    for loaded in [each for each in sys.modules if each.split(".")[0] == "trl_ext"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except Exception as error:
        print("FAILED", name, repr(error))
"""


def test_every_module_may_be_imported_first():
    package = Path(trl_ext.__file__).parent
    files = [file.relative_to(package.parent).with_suffix("") for file in package.rglob("*.py")]
    names = sorted(".".join(file.parts).removesuffix(".__init__") for file in files if file.name != "__main__")
    assert "trl_ext.monitors.health" in names and "trl_ext" in names
    assert "FAILED" not in run(["-c", IMPORTS, *names])


def test_the_process_has_no_state_but_its_own(tmp_path: Path) -> None:
    """What the tests above rely on: a state that one process makes is in no other."""
    assert tiny.trainer(trl_ext.GRPOTrainer, tmp_path).accelerator.num_processes == 1
    for _ in range(2):
        run(["-c", PRELUDE + "accelerate.PartialState(cpu=True); assert accelerate.PartialState._shared_state"])
    with pytest.raises(AssertionError, match="there is a state already"):
        run(["-c", "import accelerate; accelerate.PartialState(cpu=True)\n" + PRELUDE])
