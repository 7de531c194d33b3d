"""
DPO, then PPO: one model, one adapter that is handed on, and a run that nothing can keep from its end.
"""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import get_peft_model, load_peft_weights
from pipelines.dpo_then_ppo_worker import dpo_args, lora, pairs, policy_settings, prompts, schedule
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, TrainerCallback

import trl_ext
from trl_ext import DAPOConfig, DAPOTrainer, DUPOConfig, DUPOTrainer, GSPOConfig, GSPOTrainer, PPOConfig
from trl_ext.curriculum.schedule import DifficultyCurriculum
from trl_ext.pipelines.dpo_then_ppo import IMPLICIT_REWARD, DPOThenPPO, StageStoppedError, StaysAbove
from trl_ext.pipelines.stages import whole_checkpoint
from trl_ext.preferences.cleaning import CleaningReport, clean_by_margin
from trl_ext.preferences.pairs import NoPairsError
from trl_ext.roles.trunk import load_adapter, save_adapter, sharing_weights, storages


WORKER = Path(__file__).with_name("dpo_then_ppo_worker.py")


def adapter(folder: Any) -> dict[str, torch.Tensor]:
    # Copies, because what is read is the file itself, which may be written anew
    return {name: weight.clone() for name, weight in load_peft_weights(str(folder), device="cpu").items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


class Looks:
    """What `prepare` is called with: the stage, and what `look` says of its trainer."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, {}

    def __call__(self, stage: str, trainer: Any) -> None:
        self.seen[stage] = self.look(trainer)


def adapter_of(trainer: Any, name: str = "default") -> dict[str, torch.Tensor] | None:
    if name not in trainer.model.peft_config:
        return None
    weights = trainer.model.state_dict().items()
    return {key.replace(f".{name}.", "."): weight.clone() for key, weight in weights if f".{name}." in key}


def short(output_dir: Any, **overrides: Any) -> DPOThenPPO:
    """Given pairs, two steps a stage, nothing measured."""
    settings: dict[str, Any] = {
        "pairs": pairs(),
        "reward_funcs": tiny.low_ids,
        "dpo_args": dpo_args(max_steps=2),
        "policy_args": PPOConfig(**policy_settings(max_steps=2)),
        "held_out": None,
        **overrides,
    }
    return schedule(output_dir, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds in one process, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, str(WORKER), str(folder)], check=True, capture_output=True)
    return folder


class TestRun:
    def test_says_what_it_did(self, whole: Path) -> None:
        stages = schedule(whole, rounds=2).stages
        found = [(stage.round, stage.name, stage.steps) for stage in stages]
        assert found == [(0, "start", 0), *((r, *s) for r in (1, 2) for s in (("pairs", 0), ("dpo", 6), ("ppo", 6)))]
        measured = {(stage.round, stage.name): stage.measured.get("low_ids") for stage in stages}
        assert [key for key, estimate in measured.items() if estimate is None] == [(1, "pairs"), (2, "pairs")]
        first, last = measured[0, "start"], measured[2, "ppo"]
        assert first is not None and last is not None
        assert (first.prompts, first.samples) == (6, 12)
        assert first.low < first.mean < first.high and first.mean != last.mean
        logs = stages[3].log_history
        assert any("objective/kl" in entry for entry in logs) and logs[0]["step"] == 0

    def test_counts_the_tokens_of_pairs_and_rollouts(self, whole: Path) -> None:
        stages = {(s.round, s.name): s for s in schedule(whole, rounds=2).stages}
        for round_ in (1, 2):
            lines = (whole / f"round_{round_}/pairs/completions.jsonl").read_text().splitlines()[1:]
            sampled = sum(len(ids) for line in lines for group in json.loads(line) for _, ids, _ in group)
            assert stages[round_, "pairs"].generated_tokens == sampled > 0
            assert stages[round_, "ppo"].generated_tokens > 0
            assert stages[round_, "dpo"].generated_tokens == 0

    def test_the_result_is_the_last_adapter(self, whole: Path) -> None:
        assert same(adapter(whole), adapter(whole / "round_2/ppo"))
        assert (whole / "critic/critic.safetensors").read_bytes() == (
            whole / "round_2/ppo/critic/critic.safetensors"
        ).read_bytes()
        assert (whole / "tokenizer.json").is_file()
        policies = [adapter(whole / folder) for folder in ("start", "round_1/dpo", "round_1/ppo", "round_2/dpo")]
        assert not any(same(one, other) for one, other in zip(policies, [*policies[1:], adapter(whole)], strict=True))

    def test_each_round_makes_its_own_pairs(self, whole: Path) -> None:
        first, second = ((whole / f"round_{r}/pairs/completions.jsonl").read_text() for r in (1, 2))
        assert first.splitlines()[0] != second.splitlines()[0]  # another policy

    def test_a_finished_run_is_left_alone(self, whole: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
        run = schedule(whole, rounds=2)
        run.train()
        assert run._policy is None  # no model was wrapped
        assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}

    def test_other_settings_are_refused(self, whole: Path) -> None:
        with pytest.raises(ValueError, match=r"accuracy_threshold was 0\.75, is 0\.9.*output_dir"):
            schedule(whole, rounds=2, accuracy_threshold=0.9)
        with pytest.raises(ValueError, match=r"dpo_args\.beta was 0\.1, is 0\.3"):
            schedule(whole, rounds=2, dpo_args=dpo_args(beta=0.3))
        with pytest.raises(ValueError, match="train_dataset was"):
            schedule(whole, rounds=2, train_dataset=prompts(25))
        with pytest.raises(ValueError, match=r"policy_kwargs was \{\}, is .*schedule='mixed'.*share=0\.5"):
            schedule(whole, rounds=2, policy_kwargs={"curriculum": DifficultyCurriculum("mixed")})
        with pytest.raises(ValueError, match=r"clean was None, is \['clean_by_margin', .*'min_margin': 0\.5"):
            schedule(whole, rounds=2, clean=partial(clean_by_margin, scorer=tiny.low_ids, min_margin=0.5))
        schedule(whole, rounds=3, dpo_args=dpo_args(save_steps=3, report_to="none"))  # how it is saved, and more of it

    def test_what_hasnt_begun_may_have_other_settings(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        def full(stage: str, trainer: Any) -> None:
            if stage == "ppo":
                raise RuntimeError("no room")

        with pytest.raises(RuntimeError, match="no room"):
            short(tmp_path, prepare=full).train()
        learned = adapter(tmp_path / "round_1/dpo")
        smaller = PPOConfig(**policy_settings(max_steps=2, per_device_train_batch_size=2))
        with pytest.raises(ValueError, match=r"dpo_args\.max_steps was 2, is 3"):
            short(tmp_path, policy_args=smaller, dpo_args=dpo_args(max_steps=3))
        short(tmp_path, policy_args=smaller).train()
        assert "policy_args.per_device_train_batch_size was 8, is 2" in capsys.readouterr().out
        assert same(learned, adapter(tmp_path / "round_1/dpo"))
        with pytest.raises(ValueError, match=r"per_device_train_batch_size was 2, is 8"):
            short(tmp_path)

    def test_settings_are_kept_from_the_start(self, tmp_path: Path) -> None:
        def stopped(completion_ids: Any, **kwargs: Any) -> list[float]:
            raise KeyboardInterrupt

        sampled = {"pairs": None, "reward_funcs": stopped}
        with pytest.raises(KeyboardInterrupt):
            short(tmp_path, **sampled).train()
        with pytest.raises(ValueError, match=r"dpo_args\.seed was 7, is 1"):
            short(tmp_path, **sampled, dpo_args=dpo_args(max_steps=2, seed=1))
        with pytest.raises(ValueError, match=r"peft_config was .*'r': 4.*'r': 8"):
            short(tmp_path, **sampled, peft_config=lora(r=8))
        (tmp_path / "stages.json").unlink()
        with pytest.raises(ValueError, match=r"holds stages of a run, but no stages\.json"):
            short(tmp_path, **sampled)

    def test_a_run_may_be_moved(self, whole: Path, tmp_path: Path) -> None:
        shutil.copytree(whole, tmp_path / "moved")
        run = schedule(tmp_path / "moved", rounds=2)
        assert {Path(stage.folder).is_relative_to(tmp_path) for stage in run.stages} == {True}
        assert run.stages[-1].log_history

    def test_a_peft_config_can_be_used_again(self, tmp_path: Path) -> None:
        config = lora()
        for _ in range(2):
            short(tmp_path, peft_config=config, dpo_args=dpo_args(max_steps=1)).train()

    def test_settings_are_the_same_in_every_process(self, tmp_path: Path) -> None:
        """Among them sets of names, in an order that Python draws anew for every process."""
        code = (
            "import sys; sys.path[:0] = sys.argv[1:3]\n"
            "from pipelines.dpo_then_ppo_worker import lora, schedule\n"
            "names = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj', 'gate_proj']\n"
            "schedule(sys.argv[3], peft_config=lora(target_modules=names)).file.save()\n"
        )
        for seed in ("1", "2"):
            command = [sys.executable, "-c", code, str(WORKER.parents[1]), str(WORKER.parent), str(tmp_path)]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})


class TestHandingOn:
    def test_the_second_stage_starts_from_dpos_adapter(self, tmp_path: Path) -> None:
        looks = Looks(adapter_of)
        short(tmp_path, prepare=looks).train()
        assert same(looks.seen["ppo"], adapter(tmp_path / "round_1/dpo"))
        assert same(looks.seen["dpo"], adapter(tmp_path / "start"))

    @pytest.mark.parametrize("reference", ["base", "dpo"])
    def test_reference(self, tmp_path: Path, reference: str) -> None:
        looks = Looks(lambda trainer: adapter_of(trainer, "ref"))
        short(tmp_path, prepare=looks, reference=reference).train()
        if reference == "base":
            assert looks.seen["ppo"] is None
        else:
            assert same(looks.seen["ppo"], adapter(tmp_path / "round_1/dpo"))
        assert same(looks.seen["dpo"], adapter(tmp_path / "start"))

    def test_kl_to_the_base_is_not_zero_at_the_first_step(self, tmp_path: Path) -> None:
        """The reference is really another policy: DPO's at step 0 is KL 0 to itself, and not to the base."""
        kl = {}
        for reference in ("base", "dpo"):
            run = short(tmp_path / reference, reference=reference, peft_config=lora(lora_dropout=0.0))
            run.train()
            kl[reference] = next(e["objective/kl"] for e in run.stages[-1].log_history if "objective/kl" in e)
        assert abs(kl["dpo"]) < 1e-6 < 1e-3 < abs(kl["base"])

    def test_an_adapter_that_is_there_goes_on(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        model = get_peft_model(tiny.stopping(), lora(init_lora_weights=False))
        began = {name: weight.clone() for name, weight in model.state_dict().items()}
        looks = Looks(adapter_of)
        short(tmp_path, model=model, peft_config=None, prepare=looks).train()
        of_it = {k.replace(".default.", "."): weight for k, weight in began.items() if ".default." in k}
        assert same(looks.seen["dpo"], of_it)
        assert all(torch.equal(began[k], weight) for k, weight in model.state_dict().items() if "lora" not in k)

    def test_the_implicit_reward_is_what_dpo_learned(self, tmp_path: Path) -> None:
        """β (log π − log π_ref) of the adapter in DPO's folder, before and after PPO has trained on."""
        asked = {"prompts": ["w1 w2 ", "w3 w4 "], "completions": ["", ""], "completion_ids": [[5, 9, 2], [8, 2]]}
        found: list[list[float]] = []
        rewards: list[Any] = []

        def look(stage: str, trainer: Any) -> None:
            if stage == "ppo":
                rewards.append(trainer.reward_funcs[1])
                found.append(rewards[0](**asked))

        run = short(tmp_path, reward_funcs=[tiny.low_ids, IMPLICIT_REWARD], prepare=look)
        run.train()
        found.append(rewards[0](**asked))

        policy = get_peft_model(tiny.stopping(), lora()).eval()
        expected = []
        for prompt, ids in zip(([5, 6], [7, 8]), asked["completion_ids"], strict=True):
            logps = []
            for folder in ("round_1/dpo", "start"):
                load_adapter(policy, tmp_path / folder)
                with torch.no_grad():
                    logits = policy(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
                logps.append(sum(logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids)))
            expected.append(0.1 * (logps[0] - logps[1]))
        assert found[0] == pytest.approx(expected, abs=1e-5)
        assert found[1] == found[0]
        assert abs(expected[0]) > 1e-3

    @pytest.mark.parametrize(
        ("trainer", "config"), [(DAPOTrainer, DAPOConfig), (DUPOTrainer, DUPOConfig), (GSPOTrainer, GSPOConfig)]
    )
    def test_other_methods(self, tmp_path: Path, trainer: Any, config: Any) -> None:
        settings = policy_settings(max_steps=1, updates_per_generation=1, warmup_steps=0)
        run = short(tmp_path, policy_trainer=trainer, policy_args=config(**settings))
        run.train()
        assert [stage.name for stage in run.stages] == ["pairs", "dpo", trainer._name.lower()]
        assert not same(adapter(tmp_path), adapter(tmp_path / "round_1/dpo"))

    def test_a_stage_doesnt_depend_on_what_ran_before(self, tmp_path: Path) -> None:
        """Not even where a trainer draws before it sets its seed, as a value model without a head does."""

        class Drawing:
            accelerator = SimpleNamespace(device="cpu")

            def __init__(self) -> None:
                self.model, self.drawn = nn.Identity(), torch.rand(3).tolist()

        run, drawn = short(tmp_path), []
        for before in (1, 2):
            torch.manual_seed(before)
            drawn.append(run._trained_alone(Drawing, seed=7).drawn)
        assert drawn[0] == drawn[1]
        # Nor on the type that generation, or an engine, left the weights in
        found = {name: weight.clone() for name, weight in run.policy.named_parameters() if "lora" in name}
        run.policy.to(torch.bfloat16)
        run._trained_alone(Drawing, seed=7)
        assert same(found, {name: weight for name, weight in run.policy.named_parameters() if "lora" in name})

    def test_a_critic_goes_on_in_the_next_round(self, tmp_path: Path) -> None:
        found: list[Any] = []

        def look(stage: str, trainer: Any) -> None:
            if stage == "ppo":
                found.append({name: weight.clone() for name, weight in trainer.critic.state_dict().items()})

        short(tmp_path, rounds=2, prepare=look, policy_args=PPOConfig(**policy_settings(max_steps=1))).train()
        assert same(found[1], load_file(tmp_path / "round_1/ppo/critic/critic.safetensors"))
        assert not same(found[0], found[1])

    def test_a_curriculum_learns_in_one_stage_alone(self, tmp_path: Path) -> None:
        curriculum = DifficultyCurriculum("frontier")
        looks = Looks(lambda trainer: getattr(trainer, "curriculum", None))
        short(tmp_path, policy_kwargs={"curriculum": curriculum}, prepare=looks).train()
        assert looks.seen["ppo"].state_dict()["seen"] and not curriculum.state_dict()["seen"]

    def test_a_quantized_base(self, tmp_path: Path) -> None:
        tiny.stopping().save_pretrained(tmp_path / "base")
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        run = short(
            tmp_path,
            model=str(tmp_path / "base"),
            model_init_kwargs={"quantization_config": quantized},
        )
        base = {name: weight.clone() for name, weight in run.policy.named_parameters() if not weight.requires_grad}
        assert "Params4bit" in {type(weight).__name__ for weight in run.policy.parameters()}
        run.train()
        assert all(torch.equal(base[name], weight) for name, weight in run.policy.named_parameters() if name in base)
        adapters = [adapter(tmp_path / folder) for folder in ("start", "round_1/dpo", "round_1/ppo")]
        assert not same(adapters[0], adapters[1]) and not same(adapters[1], adapters[2])


class TestOneTrunk:
    def test_the_switch_holds_one_base(self, tmp_path: Path) -> None:
        """Every parameter that is alive while a stage begins: base and adapter once, and what the stage adds."""
        model = tiny.stopping()
        base = sum(storages(model.parameters()).values())
        sizes: dict[str, dict[str, int]] = {}

        def look(stage: str, trainer: Any) -> None:
            gc.collect()
            own = storages(p for name, p in trainer.model.named_parameters() if "lora" not in name)
            lora_ = storages(p for name, p in trainer.model.named_parameters() if "lora" in name)
            alive = [o for o in gc.get_objects() if isinstance(o, nn.Parameter)]
            like_base = [p for p in alive if p.shape == model.get_input_embeddings().weight.shape]
            sizes[stage] = {"own": sum(own.values()), "embeddings": len(storages(like_base)), "lora": len(lora_)}

        gc.collect()
        before = len(storages(o for o in gc.get_objects() if isinstance(o, nn.Parameter) and o.shape == (24, 16)))
        short(tmp_path, model=model, prepare=look, policy_args=PPOConfig(**policy_settings(max_steps=1))).train()
        critic = 16 * 4 + 4  # a linear head on 16 hidden units, in float32
        assert sizes["dpo"]["own"] == base
        assert sizes["ppo"]["own"] == base + critic
        assert sizes["dpo"]["embeddings"] == sizes["ppo"]["embeddings"] == before
        assert sizes["dpo"]["lora"] == 2 * sizes["ppo"]["lora"]  # DPO's reference, gone with it

    def test_modules_of_its_own_around_the_same_weights(self) -> None:
        model = get_peft_model(tiny.qwen2(), lora())
        copied = sharing_weights(model)
        assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
        copied.add_adapter("ref", copied.peft_config["default"])
        copied.get_base_model().forward = None
        assert list(model.peft_config) == ["default"] and "forward" not in model.get_base_model().__dict__

    def test_an_adapter_of_another_shape_is_refused(self, tmp_path: Path) -> None:
        save_adapter(get_peft_model(tiny.qwen2(), lora(target_modules=["q_proj"])), tmp_path)
        with pytest.raises(ValueError, match=r"not of this shape: .* missing"):
            load_adapter(get_peft_model(tiny.qwen2(), lora()), tmp_path)


class TestWhenDPOEnds:
    def test_above_the_threshold_for_so_many_logs(self, tmp_path: Path) -> None:
        run = short(tmp_path, dpo_args=dpo_args(max_steps=30, learning_rate=5e-2), accuracy_logs=4)
        run.train()
        accuracies = [e["rewards/accuracies"] for e in run.stages[1].log_history if "rewards/accuracies" in e]
        assert run.stages[1].steps == len(accuracies) < 30
        assert min(accuracies[-4:]) > 0.75
        # Not a log later than it could
        assert not any(min(accuracies[i : i + 4]) > 0.75 for i in range(len(accuracies) - 4))

    def test_held_out_pairs_decide_where_there_are_some(self, tmp_path: Path) -> None:
        args = dpo_args(max_steps=30, learning_rate=5e-2, eval_strategy="steps", eval_steps=3)
        run = short(tmp_path, dpo_args=args, eval_pairs=pairs(8), accuracy_logs=2)
        run.train()
        accuracies = [
            e["eval_rewards/accuracies"] for e in run.stages[1].log_history if "eval_rewards/accuracies" in e
        ]
        assert run.stages[1].steps == 3 * len(accuracies) < 30 and min(accuracies[-2:]) > 0.75

    def test_until_they_are_evaluated_nothing_decides(self, tmp_path: Path) -> None:
        """Training accuracy is above the threshold at once, and says nothing of held-out pairs."""
        args = dpo_args(max_steps=30, learning_rate=5e-2, eval_strategy="steps", eval_steps=12)
        run = short(tmp_path, dpo_args=args, eval_pairs=pairs(8), accuracy_logs=1)
        run.train()
        assert run.stages[1].steps == 12
        trained = [e["rewards/accuracies"] for e in run.stages[1].log_history if "rewards/accuracies" in e]
        assert max(trained[:10]) > 0.75

    def test_a_rule_without_enough_logs_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        short(tmp_path, accuracy_logs=5).train()
        assert "asks for 5 logs of rewards/accuracies, and there were 2" in capsys.readouterr().out

    def test_none_runs_to_the_last_step(self, tmp_path: Path) -> None:
        run = short(
            tmp_path, accuracy_threshold=None, accuracy_logs=1, dpo_args=dpo_args(max_steps=5, learning_rate=5e-2)
        )
        run.train()
        assert run.stages[1].steps == 5

    def test_killed_after_the_log_that_ended_it(self, tmp_path: Path) -> None:
        """The last checkpoint is the stage's end already: not a step more, and the same weights."""
        args = {"dpo_args": dpo_args(max_steps=30, learning_rate=5e-2, save_steps=1), "accuracy_logs": 4}
        run = short(tmp_path, **args)
        run.train()
        steps, result = run.stages[1].steps, adapter(tmp_path)
        # As it was before the stage was called finished
        file = json.loads((tmp_path / "stages.json").read_text())
        file["stages"] = file["stages"][:1]
        (tmp_path / "stages.json").write_text(json.dumps(file))
        again = short(tmp_path, **args)
        again.train()
        assert again.stages[1].steps == steps
        assert same(adapter(tmp_path), result)
        assert again.stages[-1].generated_tokens == run.stages[-1].generated_tokens > 0
        assert not list((tmp_path / "round_1/ppo").glob("optimizer*"))

    @pytest.mark.parametrize("stops", ["dpo", "ppo"])
    def test_stopped_by_someone_else(self, tmp_path: Path, stops: str) -> None:
        """A stage that a callback ends, with a checkpoint, isn't finished; the same call goes on from there."""

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_save = control.should_training_stop = state.global_step == 3

        def stop(stage: str, trainer: Any) -> None:
            if stage == stops:
                trainer.add_callback(Stop())

        args = {"dpo_args": dpo_args(), "policy_args": PPOConfig(**policy_settings()), "accuracy_threshold": None}
        run = short(tmp_path, prepare=stop, **args)
        with pytest.raises(StageStoppedError, match=f"{stops} was stopped at step 3 of 6"):
            run.train()
        assert stops not in [stage.name for stage in run.stages]
        again = short(tmp_path, **args)
        again.train()
        assert [stage.steps for stage in again.stages] == [0, 6, 6]
        never = short(tmp_path / "never", **args)
        never.train()
        assert same(adapter(tmp_path), adapter(tmp_path / "never"))

    def test_the_rule_reads_the_log_of_a_resumed_run(self) -> None:
        rule = StaysAbove(0.75, 2)

        class State:
            max_steps = 10
            log_history = [{"rewards/accuracies": a, "step": i} for i, a in enumerate((0.9, 0.7, 0.8, 0.8))]

        assert rule.reached(State()) and rule.reached(State())
        State.log_history = State.log_history[:3]
        assert not rule.reached(State())


class TestPairs:
    def test_cleaned_before_dpo(self, tmp_path: Path) -> None:
        seen = []

        def clean(given: Any) -> Any:
            seen.append(len(given))
            return given.select(range(10)), CleaningReport("by hand", ("kept",) * 10, ("",) * 10)

        looks = Looks(lambda trainer: len(trainer.train_dataset))
        short(tmp_path, clean=clean, prepare=looks).train()
        assert seen == [24] and looks.seen["dpo"] == 10
        assert "by hand" in (tmp_path / "round_1/pairs/cleaning.txt").read_text()

    @pytest.mark.parametrize(
        ("clean", "error", "message"),
        [
            (lambda given: (given.select([]), "nothing was good"), ValueError, "left none of 24 pairs:\nnothing was"),
            (lambda given: given, TypeError, "clean returned a Dataset. Let it return the pairs and a report"),
        ],
    )
    def test_what_clean_may_not_return(self, tmp_path: Path, clean: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            short(tmp_path, clean=clean).train()
        short(tmp_path).train()  # nothing was finished

    def test_the_order_of_pairs(self, tmp_path: Path) -> None:
        curriculum = DifficultyCurriculum("easy_to_hard", column="-score_margin")
        looks = Looks(lambda trainer: trainer.chooser)
        short(tmp_path, pairs=None, dpo_kwargs={"curriculum": curriculum}, prepare=looks).train()
        assert repr(looks.seen["dpo"]) == repr(curriculum) and looks.seen["dpo"] is not curriculum
        assert looks.seen["ppo"] is None
        with pytest.raises(ValueError, match=r"dpo_kwargs was .*easy_to_hard"):
            short(tmp_path, pairs=None)

    def test_a_round_without_pairs_leaves_the_one_before(self, tmp_path: Path) -> None:
        with pytest.raises(NoPairsError) as caught:
            short(tmp_path, reward_funcs=tiny.constant, rounds=2).train()
        assert f"What round 1 left is in {tmp_path}; rounds=1 ends there." in caught.value.__notes__
        assert same(adapter(tmp_path), adapter(tmp_path / "round_1/ppo"))
        assert len(short(tmp_path, reward_funcs=tiny.constant, rounds=1).train()) == 3

    def test_cross_fitted_on_the_same_trunk(self, tmp_path: Path) -> None:
        """By scorers with DPO's own settings, which are neither evaluated nor saved; the policy stays as it was."""
        args = dpo_args(max_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True)
        looks = Looks(adapter_of)
        run = short(
            tmp_path, pairs=pairs(60), eval_pairs=pairs(8), dpo_args=args, clean="cross_fitting", prepare=looks
        )
        run.train()
        assert "60 pairs, by cross-fitting in 5 folds" in (tmp_path / "round_1/pairs/cleaning.txt").read_text()
        assert same(looks.seen["dpo"], adapter(tmp_path / "start"))

    def test_reward_weights_of_those_that_judge(self, tmp_path: Path) -> None:
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


class TestErrors:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"peft_config": None}, "peft_config` is missing"),
            ({"reference": "start"}, "reference='start' is unknown"),
            ({"rounds": 0}, "rounds=0"),
            ({"accuracy_threshold": 1.5}, "accuracy_threshold=1.5"),
            ({"accuracy_logs": 0}, "accuracy_logs=0"),
            ({"reward_funcs": IMPLICIT_REWARD, "pairs": None}, "can't judge those it learns from"),
            ({"reward_funcs": IMPLICIT_REWARD, "rounds": 2}, "can't judge those it learns from"),
            ({"pairs": prompts()}, r"pairs lacks the columns \['chosen', 'rejected'\]"),
            ({"train_dataset": pairs().remove_columns("prompt")}, "train_dataset lacks"),
            ({"train_dataset": iter([])}, "train_dataset is a"),
            (
                {"dpo_args": dpo_args(eval_strategy="steps", eval_steps=1)},
                "eval_strategy of dpo_args needs eval_pairs",
            ),
            ({"policy_args": PPOConfig(**policy_settings(reward_weights=[1.0, 2.0]))}, "2 numbers for 1 rewards"),
            ({"dpo_args": dpo_args(save_only_model=True)}, "save_only_model of dpo_args"),
            ({"clean": "cross_fitting", "pairs": pairs().remove_columns("prompt")}, r"pairs lacks .* \['prompt'\]"),
            ({"clean": "well"}, "clean='well' is unknown"),
            ({"clean": "cross_fitting"}, "from 50 pairs on"),
            ({"pairs": pairs().select([])}, "pairs has no rows"),
            ({"eval_pairs": pairs()}, "dpo_args never evaluates"),
            ({"dpo_args": dpo_args(logging_strategy="no")}, "logging_strategy of dpo_args is 'no'"),
            ({"pair_settings": {"num_generation": 4}}, r"pair_settings has \['num_generation'\]"),
            ({"reward_funcs": IMPLICIT_REWARD, "held_out": prompts()}, "nor the start"),
            (
                {"policy_args": PPOConfig(**policy_settings(eval_strategy="steps", eval_steps=1))},
                "eval_strategy of policy_args needs an eval_dataset",
            ),
            (
                {"policy_args": PPOConfig(**policy_settings(sync_ref_model=True))},
                "sync_ref_model refreshes a copy of the adapter",
            ),
        ],
    )
    def test_before_a_model_is_loaded(self, tmp_path: Path, overrides: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            short(tmp_path, **{"model": "no/such/model", **overrides})
        assert not (tmp_path / "start").exists()

    def test_a_model_with_an_adapter_and_a_peft_config(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="pass one of them"):
            short(tmp_path, model=get_peft_model(tiny.qwen2(), lora()))

    def test_an_adapter_that_cant_be_trained(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny.qwen2(), lora())
        for weight in model.parameters():
            weight.requires_grad_(False)
        with pytest.raises(ValueError, match="is_trainable=True"):
            short(tmp_path, model=model, peft_config=None)

    @pytest.mark.parametrize(
        ("overrides", "error", "message"),
        [
            ({"policy_kwargs": {"curriculums": 1}}, TypeError, "curriculums"),
            ({"policy_kwargs": {"curriculum": "frontier"}}, TypeError, "curriculum='frontier' is no object"),
            ({"train_dataset": prompts(1)}, ValueError, "train_dataset has 1 prompts, fewer than the 4"),
        ],
    )
    def test_what_stage_two_cant_work_with_is_told_before_dpo(
        self, tmp_path: Path, overrides: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            short(tmp_path, **overrides).train()
        assert not (tmp_path / "round_1/dpo").exists()
        short(tmp_path).train()  # the corrected call

    @pytest.mark.parametrize(
        "overrides",
        [
            {"policy_trainer": trl_ext.DPOTrainer},
            {"policy_trainer": "ppo"},
            {"policy_args": dpo_args()},
            {"dpo_args": PPOConfig(**policy_settings())},
        ],
    )
    def test_of_another_kind(self, tmp_path: Path, overrides: Any) -> None:
        with pytest.raises(TypeError):
            short(tmp_path, **overrides)


class TestKilled:
    def test_a_checkpoint_that_was_being_written_is_removed(self, tmp_path: Path) -> None:
        for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
            (tmp_path / f"checkpoint-{step}").mkdir()
            if state is not None:
                (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(state)
        assert whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
        assert whole_checkpoint(tmp_path / "nothing") is None

    @pytest.mark.distributed
    def test_in_every_stage(self, whole: Path, tmp_path: Path) -> None:
        """
        SIGKILL at a random moment after a stage's first batch, or first checkpoint, is there; the same command, until
        it ends by itself. Every file of weights is that of the run that was never stopped, bit for bit.
        """
        begun = ["1/pairs/completions.jsonl", "1/dpo/checkpoint-2", "1/ppo/checkpoint-2", "2/ppo/checkpoint-4"]
        delays = [random.uniform(0.0, 0.4) for _ in begun]
        for begins, delay in zip(begun, delays, strict=True):
            process = subprocess.Popen([sys.executable, str(WORKER), str(tmp_path)], stdout=subprocess.DEVNULL)
            while not (tmp_path / f"round_{begins}").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, f"ended before it was killed, {delays}"
        subprocess.run([sys.executable, str(WORKER), str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
        weights = [path for path in whole.rglob("*.safetensors") if "checkpoint-" not in str(path)]
        assert len(weights) >= 9
        for path in weights:
            other = tmp_path / path.relative_to(whole)
            assert path.read_bytes() == other.read_bytes(), f"{path.relative_to(whole)}, {delays}"

    @pytest.mark.distributed
    def test_two_processes(self, tmp_path: Path) -> None:
        """Killed in DPO's stage, both of them; then to the end."""
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER), str(tmp_path)]
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, start_new_session=True)
        while not (tmp_path / "round_1/dpo/checkpoint-2").exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)  # to torchrun, which kills its workers
        process.wait()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
        assert [stage["name"] for stage in stages] == ["start", *["pairs", "dpo", "ppo"] * 2]
        assert not same(adapter(tmp_path), adapter(tmp_path / "round_2/dpo"))
