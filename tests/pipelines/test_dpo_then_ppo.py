"""
DPO, then PPO: one model, one adapter that is handed on, and a run that nothing can keep from its end.
"""

import json
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from peft import get_peft_model
from pipelines.dpo_then_ppo_worker import dpo_args, lora, policy_settings, prompts, schedule
from pipelines.runs import Looks, adapter, adapter_of, same, short
from safetensors.torch import load_file

from trl_ext import (
    DAPOConfig,
    DAPOTrainer,
    DUPOConfig,
    DUPOTrainer,
    GSPOConfig,
    GSPOTrainer,
    PPOConfig,
    RLOOConfig,
    RLOOTrainer,
)
from trl_ext.curriculum.schedule import DifficultyCurriculum
from trl_ext.preferences.cleaning import clean_by_margin
from trl_ext.rewards.implicit import IMPLICIT_REWARD
from trl_ext.roles.trunk import load_adapter


WORKER = Path(__file__).with_name("dpo_then_ppo_worker.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds in one process, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    processes.run([WORKER, folder])
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
        assert not run._policy.is_loaded
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

    @pytest.mark.train
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

    @pytest.mark.train
    def test_a_peft_config_can_be_used_again(self, tmp_path: Path) -> None:
        config = lora()
        for _ in range(2):
            short(tmp_path, peft_config=config, dpo_args=dpo_args(max_steps=1)).train()


@pytest.mark.train
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
        ("trainer", "config"),
        [
            (DAPOTrainer, DAPOConfig),
            (DUPOTrainer, DUPOConfig),
            (GSPOTrainer, GSPOConfig),
            (RLOOTrainer, RLOOConfig),
        ],
    )
    def test_other_methods(self, tmp_path: Path, trainer: Any, config: Any) -> None:
        settings = policy_settings(max_steps=1, updates_per_generation=1, warmup_steps=0)
        run = short(tmp_path, policy_trainer=trainer, policy_args=config(**settings))
        run.train()
        assert [stage.name for stage in run.stages] == ["pairs", "dpo", trainer._name.lower()]
        assert not same(adapter(tmp_path), adapter(tmp_path / "round_1/dpo"))

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
        looks = Looks(lambda trainer: getattr(trainer, "chooser", None))
        short(tmp_path, policy_kwargs={"curriculum": curriculum}, prepare=looks).train()
        learned, given = (c.state_dict()["outlook"]["outlooks"][0] for c in (looks.seen["ppo"], curriculum))
        assert learned["prompts"] and not given["prompts"]


class TestKilled:
    @pytest.mark.distributed
    def test_in_every_stage(self, whole: Path, tmp_path: Path) -> None:
        """
        SIGKILL at a random moment after a stage's first batch, or first checkpoint, is there; the same command, until
        it ends by itself. Every file of weights is that of the run that was never stopped, bit for bit.
        """
        begun = ["1/pairs/completions.jsonl", "1/dpo/checkpoint-2", "1/ppo/checkpoint-2", "2/ppo/checkpoint-4"]
        delays = [random.uniform(0.0, 0.4) for _ in begun]
        for begins, delay in zip(begun, delays, strict=True):
            process = processes.start([WORKER, tmp_path])
            while not (tmp_path / f"round_{begins}").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
            process.kill(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, f"ended before it was killed, {delays}"
        processes.run([WORKER, tmp_path])
        weights = [path for path in whole.rglob("*.safetensors") if "checkpoint-" not in str(path)]
        assert len(weights) >= 9
        for path in weights:
            other = tmp_path / path.relative_to(whole)
            assert path.read_bytes() == other.read_bytes(), f"{path.relative_to(whole)}, {delays}"

    @pytest.mark.distributed
    def test_two_processes(self, tmp_path: Path) -> None:
        """Killed in DPO's stage, both of them; then to the end."""
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER), str(tmp_path)]
        process = processes.start(command)
        while not (tmp_path / "round_1/dpo/checkpoint-2").exists() and process.poll() is None:
            time.sleep(0.05)
        process.kill(signal.SIGTERM)
        process.wait()
        processes.run(command)
        stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
        assert [stage["name"] for stage in stages] == ["start", *["pairs", "dpo", "ppo"] * 2]
        assert not same(adapter(tmp_path), adapter(tmp_path / "round_2/dpo"))
