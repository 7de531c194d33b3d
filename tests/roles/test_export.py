"""
Roles as plain weights: what is exported is loaded in a new process with the line that the export names, and says what
the training process said.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dist_cp
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig

from trl_ext import GRPOTrainer, PPOTrainer, export_role
from trl_ext.roles import export as exporting
from trl_ext.roles.critic import logps_and_values
from trl_ext.roles.export import Export, export_folder
from trl_ext.roles.merging import ExportSettings
from trl_ext.run.supervised import RewardTrainer


IDS = torch.tensor([[5, 9, 4, 17, 8, 2], [7, 7, 11, 20, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
REAL = MASK.bool()
# Merged weights are W + BA in float32, rounded once
ROUNDING = {"rtol": 0.0, "atol": 2e-5}

# What a user does with the line that an export names, where nothing of the training process is
LOADS = """
import json, sys, torch
from peft import PeftModel
from transformers import *
from trl_ext import load_critic
from trl_ext.roles.critic import logps_and_values

ids, mask, exports = json.loads(sys.argv[1])
ids, mask, found = torch.tensor(ids), torch.tensor(mask), {}
for name, line in exports.items():
    torch.manual_seed(len(found))  # of weights that a file lacks
    if line.startswith("load_critic("):
        folder, _, policy = line.removeprefix("load_critic(").removesuffix(")").partition(", ")
        policy = eval(policy).eval()
        load_critic(eval(folder), policy)
        with torch.no_grad():
            found[name] = logps_and_values(policy, ids, mask)
    else:
        with torch.no_grad():
            found[name] = eval(line).eval()(input_ids=ids, attention_mask=mask).logits
torch.save(found, sys.argv[2])
"""


def in_a_new_process(exports: dict[str, Export], folder: Path) -> dict[str, Any]:
    """What the exported models say of the tokens."""
    lines = {name: export.load for name, export in exports.items()}
    asked = json.dumps([IDS.tolist(), MASK.tolist(), lines])
    processes.run(["-c", LOADS, asked, folder / "said.pt"])
    return torch.load(folder / "said.pt")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits


def pairs() -> Dataset:
    rows = [{"prompt": f"w{i} w1", "chosen": f" w2 w{i}", "rejected": f" w3 w{i}"} for i in range(16)]
    return Dataset.from_list(rows)


@dataclass
class Run:
    """A finished run, and what its models said at the end of it."""

    folder: Path
    logits: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Has a base model with a tokenizer, `base`."""
    folder = tmp_path_factory.mktemp("export")
    tiny.stopping().save_pretrained(folder / "base")
    return folder


def ppo(root: Path, name: str, arguments: dict[str, Any], **settings: Any) -> Run:
    few = {"num_generations": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    given = {"model": str(root / "base"), **arguments}
    trainer = tiny.trainer(PPOTrainer, root / name, tiny.hashed, given, **few, **settings)
    trainer.train()
    trainer.save_model()
    model = trainer.model.eval()
    with torch.no_grad():
        logps, values = logps_and_values(model, IDS, MASK)
    said = {"logps": logps, "values": values}
    if "ref" in getattr(model, "peft_config", {}):
        model.set_adapter("ref")
        said["reference"] = logits(model)
        model.set_adapter("default")
    elif trainer.ref_model is not None:
        said["reference"] = logits(trainer.ref_model)
    return Run(root / name, logits(model), said)


@pytest.fixture(scope="module")
def lora_head(root) -> Run:
    return ppo(root, "lora_head", {"peft_config": tiny.lora(use_rslora=True)}, save_strategy="steps", save_steps=1)


@pytest.fixture(scope="module")
def full_mlp(root) -> Run:
    """Full weights, and a reference that moves."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "beta": 0.1}
    return ppo(root, "full_mlp", {}, critic_head="mlp", save_strategy="steps", save_steps=2, **moving)


@pytest.fixture(scope="module")
def own_model(root) -> Run:
    return ppo(root, "own_model", {"value_model": tiny.classifier()})


@pytest.fixture(scope="module")
def given_adapter(root) -> Run:
    """A policy that comes with an adapter, whose copy is the reference."""
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    torch.manual_seed(5)
    policy = get_peft_model(base, tiny.lora(task_type="CAUSAL_LM"))
    return ppo(root, "given_adapter", {"model": policy, "processing_class": tiny.tokenizer()}, beta=0.1)


@pytest.fixture(scope="module")
def reward_adapter(root) -> Run:
    args = RewardConfig(**tiny.pair_settings(root / "reward", max_length=None))
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=args,
        processing_class=tiny.tokenizer(),
        train_dataset=pairs(),
        peft_config=tiny.lora(task_type="SEQ_CLS"),
    )
    trainer.train()
    trainer.save_model()
    return Run(root / "reward", logits(trainer.model))


@pytest.mark.train
def test_exports_say_what_the_training_process_said(
    root, lora_head, full_mlp, own_model, given_adapter, reward_adapter
) -> None:
    exports: dict[str, Export] = {}
    for name, run in {"lora": lora_head, "given": given_adapter, "reward": reward_adapter}.items():
        role = "reward" if name == "reward" else "policy"
        exports[f"{name} apart"] = export_role(run.folder, role)
        exports[f"{name} merged"] = export_role(run.folder, role, merge=True, output=root / f"{name}_merged")
    exports["critic apart"] = export_role(lora_head.folder, "critic")
    exports["critic merged"] = export_role(lora_head.folder, "critic", merge=True, output=root / "critic_merged")
    exports["reference apart"] = export_role(given_adapter.folder, "reference")
    exports["reference merged"] = export_role(
        given_adapter.folder, "reference", merge=True, output=root / "ref_merged"
    )
    exports["whole"] = export_role(full_mlp.folder)
    exports["mlp"] = export_role(full_mlp.folder, "critic")
    exports["moved reference"] = export_role(full_mlp.folder, "reference", checkpoint=2)
    exports["own model"] = export_role(own_model.folder, "critic")
    every = exports["own model"].load.replace("Sequence", "Token").replace("')", "', num_labels=1)")
    exports["own model, every state"] = Export("", every)
    found = in_a_new_process(exports, root)

    for name, run in {"lora": lora_head, "given": given_adapter, "reward": reward_adapter}.items():
        assert torch.equal(found[f"{name} apart"], run.logits), name
        torch.testing.assert_close(found[f"{name} merged"], run.logits, **ROUNDING)
    assert torch.equal(found["whole"], full_mlp.logits)
    assert torch.equal(found["mlp"][0], full_mlp.extra["logps"])
    assert torch.equal(found["mlp"][1], full_mlp.extra["values"])
    assert torch.equal(found["critic apart"].squeeze(-1)[REAL], lora_head.extra["values"][REAL])
    torch.testing.assert_close(found["critic merged"].squeeze(-1)[REAL], lora_head.extra["values"][REAL], **ROUNDING)
    values = own_model.extra["values"]
    torch.testing.assert_close(found["own model, every state"].squeeze(-1)[REAL], values[REAL])
    last = torch.stack([values[0, 5], values[1, 4]])
    torch.testing.assert_close(found["own model"].squeeze(-1), last)
    assert torch.equal(found["reference apart"], given_adapter.extra["reference"])
    torch.testing.assert_close(found["reference merged"], given_adapter.extra["reference"], **ROUNDING)
    assert torch.equal(found["moved reference"], full_mlp.extra["reference"])
    # None of it is near by chance: roles differ by far more than rounding
    for run in (lora_head, given_adapter, full_mlp):
        assert not torch.allclose(run.logits, run.extra["reference"], atol=1e-3)
    assert lora_head.extra["values"].abs().max() > 1e-2


def own_adapter(root: Path, head: str) -> tuple[Path, torch.Tensor]:
    """A run whose critic is an adapter of its own, as `critic="adapter"` saves it, and its values by hand."""
    run, _ = saved_adapter(root, "run", tiny.lora())
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(root / "run_base")
    critic = get_peft_model(base, tiny.lora(r=2, target_modules=["k_proj", "up_proj"]))
    critic.save_pretrained(run / "critic" / "adapter")
    weights = {"head.out.weight": torch.randn(1, 16), "head.out.bias": torch.randn(1)}
    save_file(weights, run / "critic" / "critic.safetensors")
    (run / "critic" / "critic_config.json").write_text(json.dumps({"critic": "adapter", "head": head}))
    with torch.no_grad():
        hidden = critic.eval().get_base_model().model(IDS, attention_mask=MASK).last_hidden_state
    return run, hidden @ weights["head.out.weight"][0] + weights["head.out.bias"]


def test_a_critic_that_is_an_adapter_of_its_own(tmp_path) -> None:
    run, values = own_adapter(tmp_path, "linear")
    exports = {"apart": export_folder(run, tmp_path / "apart", "critic")}
    exports["merged"] = export_folder(run, tmp_path / "merged", "critic", ExportSettings(merge=True))
    found = in_a_new_process(exports, tmp_path)
    for name in exports:
        torch.testing.assert_close(found[name].squeeze(-1)[REAL], values[REAL], **ROUNDING)
    config = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert (config["r"], config["modules_to_save"], config["task_type"]) == (2, ["score"], "TOKEN_CLS")


def test_a_critic_that_transformers_has_no_class_for(tmp_path) -> None:
    run, _ = own_adapter(tmp_path, "mlp")
    export = export_folder(run, tmp_path / "apart", "critic")
    assert export.load.startswith("load_critic('") and (export.folder / "critic" / "adapter").is_dir()
    with pytest.raises(ValueError, match=r"a head that transformers has no class for\. Leave merge out"):
        export_folder(run, tmp_path / "merged", "critic", ExportSettings(merge=True))
    # A policy's adapter that changes the language model's head fits no classifier
    run, _ = saved_adapter(tmp_path, "head", tiny.lora(modules_to_save=["lm_head"]))
    shutil.copytree(tmp_path / "run" / "critic", run / "critic")
    shutil.rmtree(run / "critic" / "adapter")
    (run / "critic" / "critic_config.json").write_text(json.dumps({"critic": "head", "head": "linear"}))
    export = export_folder(run, tmp_path / "with head", "critic")
    assert export.load.startswith("load_critic('") and "beside the policy, an adapter on" in export.form


@pytest.mark.train
def test_what_comes_along(root, lora_head) -> None:
    apart, merged = (lora_head.folder / "exported" / name for name in ("policy", "merged"))
    if not apart.exists():
        export_role(lora_head.folder)
    export_role(lora_head.folder, merge=True, output=merged)
    before = json.loads((lora_head.folder / "adapter_config.json").read_text())
    after = json.loads((apart / "adapter_config.json").read_text())
    assert after == before
    assert (after["r"], after["lora_alpha"], after["use_rslora"]) == (4, 8, True)
    for folder in (apart, merged):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (lora_head.folder / name).read_bytes()
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt") or path.is_dir()]
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] in (2, [2])
    names = load_file(merged / "model.safetensors").keys()
    assert names == load_file(root / "base" / "model.safetensors").keys()


# Adapters that were never trained


def saved_adapter(root: Path, name: str, config: Any, **overrides: Any) -> tuple[Path, torch.Tensor]:
    """An adapter with random weights on a base model, and what they say together."""
    folder, base = root / name, root / f"{name}_base"
    tiny.qwen2(**overrides).save_pretrained(base)
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, logits(model)


LAYERS: dict[str, Any] = {
    "dora": tiny.lora(use_dora=True),
    "the head, saved whole": tiny.lora(modules_to_save=["lm_head"]),
    "the head": tiny.lora(target_modules=["q_proj", "lm_head"]),
    "words": tiny.lora(target_modules=["q_proj", "embed_tokens"]),
    "words, tied": tiny.lora(target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True),
    "some words": tiny.lora(trainable_token_indices={"embed_tokens": [5, 9]}),
    "bias": tiny.lora(bias="lora_only"),
    "start from the base": tiny.lora(init_lora_weights="pissa"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_survives_merging(tmp_path, name, tied) -> None:
    """With tied embeddings an adapter of one end moves the other, unless they are parted first."""
    folder, expected = saved_adapter(tmp_path, "adapter", LAYERS[name], tie_word_embeddings=tied)
    export = export_folder(folder, tmp_path / "merged", settings=ExportSettings(merge=True))
    merged = AutoModelForCausalLM.from_pretrained(export.folder)
    torch.testing.assert_close(logits(merged), expected, **ROUNDING)
    parted = name in ("the head, saved whole", "the head", "words")
    assert merged.config.tie_word_embeddings == (tied and not parted)


def test_a_type_is_kept_or_chosen_and_what_rounding_costs_is_said(tmp_path) -> None:
    folder, _ = saved_adapter(tmp_path, "adapter", tiny.lora())
    base = tmp_path / "adapter_base"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    kept = export_folder(folder, tmp_path / "kept", settings=ExportSettings(merge=True))
    assert {weight.dtype for weight in load_file(kept.folder / "model.safetensors").values()} == {torch.bfloat16}
    (note,) = kept.notes
    assert note.startswith("Rounding to bfloat16 changes the adapter's update by ") and "in bfloat16" in kept.form
    chosen = export_folder(folder, tmp_path / "chosen", settings=ExportSettings(merge=True, dtype="float32"))
    assert not chosen.notes and "in float32" in chosen.form
    # By hand, from the files: W' = round(W + round(BA)), of the update BA
    first, adapter = load_file(base / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    error = update = 0.0
    for name in (name for name in adapter if "lora_A" in name):
        delta = adapter[name.replace("lora_A", "lora_B")] @ adapter[name] * 2.0  # alpha 8, rank 4
        layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
        error += ((first[layer] + delta.bfloat16()).float() - first[layer].float() - delta).square().sum().item()
        update += delta.square().sum().item()
    assert f" by {(error / update) ** 0.5:.1%} (" in note
    apart = export_folder(folder, tmp_path / "apart", settings=ExportSettings(dtype="bfloat16"))
    assert {w.dtype for w in load_file(apart.folder / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_another_place_of_the_base(tmp_path) -> None:
    folder, expected = saved_adapter(tmp_path, "adapter", tiny.lora())
    (tmp_path / "adapter_base").rename(tmp_path / "moved")
    settings = ExportSettings(merge=True, base=str(tmp_path / "moved"))
    merged = export_folder(folder, tmp_path / "merged", settings=settings)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged.folder)), expected, **ROUNDING)
    apart = export_folder(folder, tmp_path / "apart", settings=ExportSettings(base=settings.base))
    assert json.loads((apart.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == settings.base


@pytest.mark.train
def test_an_adapter_on_a_4_bit_base(tmp_path) -> None:
    """It is merged into the weights that it was trained on; on weights of full precision it is another model."""
    base = tiny.qwen2(hidden_size=64, intermediate_size=128, initializer_range=0.2)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=tiny.nf4())
    trainer = tiny.trainer(
        GRPOTrainer, tmp_path / "run", tiny.hashed, {"model": model, "peft_config": tiny.lora()}, max_steps=1
    )
    trainer.train()
    trainer.save_model()
    expected = logits(trainer.model)
    merged = export_role(tmp_path / "run", merge=True, dtype="float32")
    full = export_role(tmp_path / "run", merge=True, full_precision=True, output=tmp_path / "full")
    assert "trained on a quantized base (load_in_4bit)" in merged.notes[0] and "to rounding" in merged.notes[0]
    assert "full precision: not quite the model that was trained" in full.notes[0]
    found = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert not hasattr(found.config, "quantization_config")
    apart = export_role(tmp_path / "run", output=tmp_path / "apart")
    arguments = json.loads((apart.folder / "base_quantization.json").read_text())

    def on_base(dtype: torch.dtype) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **arguments)
        again = PeftModel.from_pretrained(base, apart.folder)
        for name, weight in again.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.to(dtype)
        return logits(again)

    # TRL trains adapters on a quantized base in bfloat16; PEFT loads and merges them in float32
    assert torch.equal(on_base(torch.bfloat16), expected)
    exact = on_base(torch.float32)
    torch.testing.assert_close(logits(found), exact, **ROUNDING)
    other = logits(AutoModelForCausalLM.from_pretrained(full.folder))
    assert (other - exact).abs().max() > 10 * (expected - exact).abs().max()


# Weights that processes wrote in parts


def test_parts_of_fsdp_are_put_together(tmp_path) -> None:
    """As Accelerate writes them under SHARDED_STATE_DICT: `save_model` writes no other file."""
    policy = tiny.qwen2()
    policy.save_pretrained(tmp_path / "base")
    weights = {**policy.state_dict(), "critic.head.out.weight": torch.ones(1, 16)}
    parts = tmp_path / "run" / "checkpoint-3" / "pytorch_model_fsdp_0"
    dist_cp.save({"model": weights}, storage_writer=dist_cp.FileSystemWriter(parts), no_dist=True)
    (parts.parent / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="are in parts, one a process, and FSDP has written no configuration"):
        export_role(tmp_path / "run")
    export = export_role(tmp_path / "run", base=str(tmp_path / "base"))
    assert export.folder == tmp_path / "run" / "exported" / "policy-checkpoint-3"
    assert export.notes == ["The run has not ended with a model: exported is checkpoint-3, its last whole checkpoint."]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(export.folder)), logits(policy))
    with pytest.raises(ValueError, match=r"has no critic that can be exported: .* Resume the run with stage3_gather"):
        export_role(tmp_path / "run", "critic")
    wrong = tiny.qwen2(hidden_size=32)
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(
        ValueError, match=r"has not the weights of Qwen2ForCausalLM: 0 are missing, 0 unknown, 2\d of an"
    ):
        export_role(tmp_path / "run", base=str(tmp_path / "wrong"), output=tmp_path / "out")


def test_parts_of_an_adapter_are_an_error(tmp_path) -> None:
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}
    tiny.qwen2().save_pretrained(tmp_path / "base")
    parts = tmp_path / "run" / "pytorch_model_fsdp_0"
    dist_cp.save({"model": weights}, storage_writer=dist_cp.FileSystemWriter(parts), no_dist=True)
    with pytest.raises(ValueError, match=r"those of an adapter .* Resume the run with fsdp_state_dict_type: FULL"):
        export_role(tmp_path / "run", base=str(tmp_path / "base"))


# What is refused


def refused(message: str, call: Callable[..., Any], *args: Any, **settings: Any) -> None:
    with pytest.raises((ValueError, FileExistsError), match=message):
        call(*args, **settings)


@pytest.mark.train
def test_roles_that_a_run_has_not(lora_head, full_mlp, reward_adapter, tmp_path) -> None:
    refused(
        "has no reward. It has: policy, critic, reference. A reward model is sav",
        export_role,
        lora_head.folder,
        "reward",
    )
    refused("has no policy. It has: reward. It is a reward model", export_role, reward_adapter.folder)
    refused("has no critic. It has: reward. Only PPO trains a critic", export_role, reward_adapter.folder, "critic")
    refused("Its reference is the base .*base' without the adapter", export_role, reward_adapter.folder, "reference")
    refused("role='actor' is unknown. Choose one of 'policy', 'critic'", export_role, lora_head.folder, "actor")
    refused("dtype='int8' is unknown. Choose one of 'float32'", export_role, lora_head.folder, dtype="int8")
    whole = {"output": tmp_path / "out"}
    refused("nothing to merge in .* whole already. Leave merge out", export_role, full_mlp.folder, merge=True, **whole)
    refused("base is 'b', but .* has whole weights", export_role, full_mlp.folder, base="b", **whole)


def test_bases_that_are_not_the_base(tmp_path) -> None:
    folder, _ = saved_adapter(tmp_path, "adapter", tiny.lora())
    tiny.qwen2(hidden_size=32).save_pretrained(tmp_path / "wide")
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    tiny.qwen2(num_hidden_layers=3).save_pretrained(tmp_path / "deep")

    def merge(base: str | None) -> None:
        export_folder(folder, tmp_path / "out", settings=ExportSettings(merge=True, base=base))

    names = f"adapter in {folder} .*"
    refused(
        names + "doesn't fit the base '.*wide', which is of another shape: .*size mismatch",
        merge,
        str(tmp_path / "wide"),
    )
    refused(
        names + "doesn't fit the base '.*gpt2', which is of another shape: .*Pass the", merge, str(tmp_path / "gpt2")
    )
    refused(names + "doesn't fit the base '.*deep'.* 4 of its weights are missing", merge, str(tmp_path / "deep"))
    refused("base 'no-one/no-model' of the adapter in .* can't be loaded: .* as base", merge, "no-one/no-model")
    refused("base '.*adapter' of the adapter in .* is an adapter itself", merge, str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused("doesn't say on which base it was trained. Pass the folder or the Hub id", merge, None)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("_*"))


def test_prompts_that_are_learned_cannot_be_merged(tmp_path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    folder, _ = saved_adapter(tmp_path, "prompts", config)
    settings = ExportSettings(merge=True)
    refused(
        "of the type PROMPT_TUNING, which can't be merged", export_folder, folder, tmp_path / "out", settings=settings
    )


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch) -> None:
    folder, expected = saved_adapter(tmp_path, "adapter", tiny.lora())
    out = tmp_path / "out"
    out.mkdir()
    export_folder(folder, out)  # an empty folder is free
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused("which is not empty. Choose a new folder, or pass overwrite", export_folder, folder, out)

    def fails(source: Path, target: Path, settings: Any) -> Any:
        (target / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setitem(exporting.EXPORTS, "policy", fails)
        export_folder(folder, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export_folder(folder, out, settings=ExportSettings(merge=True), overwrite=True)
    assert not (out / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, **ROUNDING)
    assert not list(tmp_path.glob("_*"))
    refused("which holds what is exported", export_folder, folder, tmp_path, overwrite=True)
