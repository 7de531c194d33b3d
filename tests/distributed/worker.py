"""
Runs every case on however many processes it was started with, and writes what each process trained on.

The completions are a fixed function of prompt and position in the group, so that one process and several are given
the same rollouts. Started by `test_processes.py` with torchrun, or with plain Python for one process.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from comparing import Gradients

import trl_ext
from trl_ext.curriculum.schedule import DifficultyCurriculum
from trl_ext.evaluation.credit import credit_by_token
from trl_ext.trainers.trl_1_12 import completions_table


INFORMED: dict[str, Any] = {
    "rollout_selection": "refill",
    "refill_draws": "informed",
    "similar_prompts_columns": ["target"],
    "rare": True,
}

# Every case: rows on all processes per micro-batch, and what the config says beside it. One optimizer step takes a
# whole generation batch, so that neither the deal into micro-batches nor the number of processes changes the gradient.
CASES: dict[str, dict[str, Any]] = {
    "all": {"rows": 8},
    "refill": {"rows": 8, "rollout_selection": "refill"},
    "duplicate": {"rows": 8, "rollout_selection": "duplicate"},
    # 3 groups of 4 on 2 processes of 6 rows: the second group stands on both
    "refill_spanning": {"rows": 6, "rollout_selection": "refill"},
    "duplicate_spanning": {"rows": 6, "rollout_selection": "duplicate"},
    # Groups of 3: one prompt alone can't give two processes equally many rows
    "refill_odd_groups": {"rows": 6, "rollout_selection": "refill", "num_generations": 3},
    # The second batch knows the first: prompts that were dealt are replaced on all processes alike
    "refill_informed": {"rows": 8, **INFORMED},
    "refill_informed_spanning": {"rows": 6, **INFORMED},
    # Nothing but what is read of a prompt says whether it is live
    "refill_informed_by_prompts": {
        "rows": 8,
        **INFORMED,
        "similar_prompts_columns": None,
        "short": True,
        "max_steps": 6,
        "learning_rate": 1e-3,
    },
    # Prompts get 2 to 6 completions, some of which stand on both processes
    "group_sizes": {"rows": 6, **INFORMED, "num_generations": 2, "max_num_generations": 6},
    # More than half of the groups stay dead: copies travel, and the rounds are used up
    "refill_capped": {"rows": 16, "rollout_selection": "refill", "max_refill_rounds": 1, "rare": True},
    "duplicate_rare": {"rows": 16, "rollout_selection": "duplicate", "rare": True},
    # Prompts that were dealt make room for others on all processes alike
    "curriculum": {"rows": 8, "curriculum": {"schedule": "easy_to_hard", "column": "-target"}},
    "curriculum_refill_spanning": {
        "rows": 6,
        "rollout_selection": "refill",
        "curriculum": {"schedule": "mixed", "column": "target"},
    },
    "curriculum_predicted": {
        "rows": 8,
        "curriculum": {"schedule": "frontier"},
        "short": True,
        "max_steps": 6,
        "learning_rate": 1e-3,
    },
    "leave_one_out": {"rows": 8, "rollout_selection": "refill", "advantage_estimator": "leave_one_out"},
    "batch_scaled_copies": {
        "rows": 16,
        "rollout_selection": "duplicate",
        "scale_rewards": "batch",
        "rare": True,
    },
}

# The same step from micro-batches that fit their rows, on one process and on two, and from TRL's
FIT_CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "shared": {"loss_type": "grpo", "share_prefixes": "always"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "vespo": {"loss_type": "vespo"},
    "bnpo": {"loss_type": "bnpo"},
    "sequence": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "kl": {"loss_type": "grpo", "beta": 0.1},
    "copies": {"loss_type": "dapo", "rollout_selection": "duplicate"},
    "mostly_dead": {"loss_type": "dapo", "rare": True},
    "trust_region": {"num_iterations": 2, "trust_region": "binary_tv", "trust_region_threshold": 0.02},
}

# RLOO: TRL's gradient, on one process and on two
RLOO_CASES: dict[str, dict[str, Any]] = {
    "kl": {"beta": 0.1, "epsilon": 0.05},
    "normalized_lora": {
        "beta": 0.1,
        "epsilon": 0.05,
        "normalize_advantages": True,
        "adapted": True,
        "num_generations": 8,
    },
    "without_kl": {"beta": 0.0, "num_iterations": 2, "epsilon": 0.05},
}

# PPO: the same step from the same rollouts, on one process and on two
PPO_CASES: dict[str, dict[str, Any]] = {
    "head": {},
    "shared": {"critic_head": "mlp", "critic_trunk_grad": 0.5, "gradient_checkpointing": True},
    "model": {"critic": "model"},
    "adapter": {
        "adapted": True,
        "critic": "model",
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
    },
    "critic_adapter": {"adapted": True, "critic": "adapter", "gradient_checkpointing": True},
    "warm_up": {"critic_warmup_steps": 1, "critic_trunk_grad": 0.5},
    "vapo": {
        "critic": "model",
        "num_generations": 4,
        "critic_warmup_steps": 2,
        "critic_warmup_explained_variance": -1e9,
        "critic_lam": 1.0,
        "lam_alpha": 0.4,
        "epsilon_high": 0.28,
        "positive_nll_coef": 0.1,
        "success_threshold": 0.8,
        "cliprange_value": None,
        "token_normalization": "mini_batch",
    },
    "steps": {"num_generations": 4, "rollout_selection": "refill", "reward": "by_step", "reward_weights": [2.0]},
    "everything": {
        "reward_scaling": "running",
        "reward_clip": 2.0,
        "missing_eos_penalty": 0.5,
        "whiten_rewards": True,
        "kl_target": 0.01,
        "kl_rule": "exponential",
        "old_kl_coef": 0.1,
        "old_kl_target": 1e-4,
        "positive_nll_coef": 0.1,
        "bootstrap_truncated": True,
        "num_iterations": 2,
    },
    "right_ones": {"positive_nll_coef": 5.0, "success_threshold": 0.8},
    "text": {"ptx_coef": 0.5},
    "broken": {"reward": "explodes"},
    # Every process replays rows of its own
    "replay": {"replay_ratio": 0.5},
}


LOGGED = ("selection/", "curriculum/", "reward", "completions/", "num_tokens", "frac_reward_zero_std")


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def fixed_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on the prompt and the place in its group, on nothing else."""
    start = trainer.accelerator.process_index * len(prompts)
    completions = []
    for i, prompt in enumerate(prompts):
        number = digest(f"{prompt} {(start + i) % trainer.num_generations}")
        completions.append([4 + (number >> 8 * k) % 20 for k in range(1 + number % 5)] + [2])
    prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def rare_success(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Only some prompts have any success, so that most groups are dead."""
    return [
        float(digest(prompt) % 3 == 0 and ids[0] % 2 == 0) for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def short_success(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Only prompts of up to three words have any success."""
    return [
        float(len(prompt.split()) <= 3 and ids[0] % 2 == 0)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


class Recorder(trl_ext.GRPOTrainer):
    """Keeps the completions of the rows that enter the loss, and the advantage of each."""

    def on_rollouts(self, output: Any, batch: Any) -> None:
        super().on_rollouts(output, batch)
        self.trained = getattr(self, "trained", [])
        for ids, mask, advantage in zip(
            output["completion_ids"], output["completion_mask"], output["advantages"], strict=True
        ):
            self.trained.append((tuple(ids[mask.bool()].tolist()), round(float(advantage), 5)))


def ragged_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """[`fixed_rollouts`] of prompts that differ in length, with completions of 2 to 14 tokens."""
    output = fixed_rollouts(prompts, trainer)
    output["completion_ids"] = [[*(ids * 3)[: 2 + digest(f"{ids}") % 13], 2] for ids in output["completion_ids"]]
    output["prompt_ids"] = [
        ids * (1 + digest(prompt) % 3) for ids, prompt in zip(output["prompt_ids"], prompts, strict=False)
    ]
    return output


def fit(case: dict[str, Any], output_dir: Path, processes: int, fitted: bool) -> dict[str, Any]:
    """Two steps on 32 rows each, in 4 micro-batches of one process or of each of two."""
    settings, gradients = dict(case), Gradients()
    rare = settings.pop("rare", False)
    if not fitted:
        settings.pop("share_prefixes", None)
    policy = output_dir.with_name("policy")  # on disk: TRL loads the reference from there
    if processes == 1:  # the launch that comes first
        tiny.qwen2().save_pretrained(policy)
    config = trl_ext.GRPOConfig(
        **tiny.cpu_settings(
            output_dir,
            per_device_train_batch_size=8 // processes,
            gradient_accumulation_steps=4,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=0.1,
            max_grad_norm=0.0,
            max_steps=2,
            max_completion_length=16,
            fit_micro_batches=fitted,
            **settings,
        )
    )
    trainer = trl_ext.GRPOTrainer(
        model=str(policy),
        reward_funcs=rare_success if rare else tiny.first_token_even,
        args=config,
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
        rollout_func=ragged_rollouts,
        callbacks=[gradients],
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"gradients": gradients.vectors, "saved": trainer.saved_compute, "sharing": trainer.sharing, "logs": logs}


def rloo(case: dict[str, Any], output_dir: Path, processes: int, trainer_class: Any) -> dict[str, Any]:
    """Two steps on 32 sampled rows each. Each process samples with its own seed, TRL's trainer as ours."""
    settings, gradients, reward = dict(case), Gradients(), tiny.Remembering(tiny.hashed)
    config_class = trl_ext.RLOOConfig if issubclass(trainer_class, trl_ext.RLOOTrainer) else trl.RLOOConfig
    adapted = settings.pop("adapted", False)
    config = config_class(
        **tiny.cpu_settings(
            output_dir,
            **{
                "per_device_train_batch_size": 8 // processes,
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 4,
                "optim": "sgd",
                "lr_scheduler_type": "constant",
                "learning_rate": 3e-2,
                "max_steps": 2,
                "max_completion_length": 12,
                "model_init_kwargs": {"dtype": torch.float64},  # see `tests/trainers/test_rloo.py`
                **settings,
            },
        )
    )
    model: Any = str(output_dir.with_name("stopping"))
    if adapted:  # it comes with its adapter, of which TRL, too, keeps a copy for the reference
        torch.manual_seed(4)
        model = get_peft_model(tiny.stopping().double(), tiny.lora(lora_alpha=16))
        config.model_init_kwargs = None
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=tiny.ragged(),
        processing_class=tiny.tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "gradients": gradients.vectors,
        "completions": [ids for call in reward.calls for ids in call.completion_ids],
        "clipped": sum(log["clip_ratio/region_mean"] for log in logs),
        "kl": [log["kl"] for log in logs if "kl" in log],
    }


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(case: dict[str, Any], output_dir: Path, processes: int) -> dict[str, Any]:
    settings = dict(case)
    rows, rare, curriculum = settings.pop("rows"), settings.pop("rare", False), settings.pop("curriculum", None)
    short = settings.pop("short", False)
    given = {
        "per_device_train_batch_size": rows // processes,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.5,  # which makes rounding visible
        "max_grad_norm": 0.0,
        "share_prefixes": False,  # one process and two share different rows: `fit` compares that
        "max_steps": 2,
    }
    config = trl_ext.GRPOConfig(**tiny.cpu_settings(output_dir, **{**given, **settings}))
    trainer = Recorder(
        model=tiny.qwen2(),
        reward_funcs=short_success if short else rare_success if rare else tiny.first_token_even,
        args=config,
        train_dataset=tiny.ragged(64) if short else tiny.prompts(64),
        processing_class=tiny.tokenizer(),
        rollout_func=fixed_rollouts,
        curriculum=curriculum and DifficultyCurriculum(**curriculum),
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    return {
        "weights": weights(trainer),
        "trained": trainer.trained,
        "outlook": trainer.run_state().get("outlook") or trainer.run_state().get("curriculum", {}).get("outlook"),
        "counters": trainer.counters,
        "logs": [
            {key: value for key, value in log.items() if key.startswith(LOGGED)} for log in trainer.state.log_history
        ],
    }


def by_step(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[list[tuple[int, float]]]:
    """Steps at the first and at the last token; many groups are dead."""
    return [
        [(0, float(ids[0] % 2)), (len(ids) - 1, success)]
        for ids, success in zip(completion_ids, rare_success(prompts, completion_ids), strict=True)
    ]


def explodes(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    """In the second step, the reward of the completions with one number is more than the square of it can hold."""
    broken = trainer_state.global_step == 1
    return [1e30 if broken and sum(ids) % 8 == 0 else float(ids[0] % 2) for ids in completion_ids]


def some_end(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """[`fixed_rollouts`], of which about half are cut off."""
    output = fixed_rollouts(prompts, trainer)
    output["completion_ids"] = [ids[:-1] if sum(ids) % 2 else ids for ids in output["completion_ids"]]
    return output


def ppo(case: dict[str, Any], output_dir: Path, processes: int) -> dict[str, Any]:
    """Three steps on 16 rows each."""
    settings, gradients = dict(case), Gradients()
    reward = {"by_step": by_step, "explodes": explodes}.get(settings.pop("reward", ""), tiny.hashed)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    config = trl_ext.PPOConfig(
        **tiny.cpu_settings(
            output_dir,
            **{
                "per_device_train_batch_size": 8 // processes,
                "gradient_accumulation_steps": 2,
                "num_generations": 1,
                "num_iterations": 1,
                "optim": "sgd",
                "lr_scheduler_type": "constant",
                "learning_rate": 0.1,
                "critic_learning_rate": 0.1,
                "max_grad_norm": 0.0,
                "max_steps": 3,
                **{name: value for name, value in settings.items() if name != "adapted"},
            },
        )
    )
    torch.manual_seed(0)  # of new adapters
    trainer = trl_ext.PPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=reward,
        args=config,
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
        rollout_func=some_end,
        callbacks=[gradients],
        peft_config=adapter if "adapted" in case else None,
        ptx_dataset=Dataset.from_dict({"text": [f"w{i} w{i + 1}" for i in range(19)]}) if "ptx_coef" in case else None,
    )
    before = weights(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    state = {
        name: value for name, value in trainer.run_state().items() if name in ("kl_coef", "old_kl_coef", "skipped")
    }
    return {
        "before": before,
        "weights": weights(trainer),
        "logs": logs,
        "state": state,
        "skipped": trainer.skipped_steps,
        # Five rows are no multiple of two processes
        "completions": completions_table(trainer, tiny.prompts(5), sampling=False),
        "credits": credit_by_token(trainer, list(tiny.prompts(5))),
    }


def resume(output_dir: Path, processes: int, checkpoint: str | None) -> dict[str, Any]:
    """DAPO over four steps with two updates a generation, from the start or from a checkpoint in mid-generation."""
    trainer = trl_ext.DAPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=tiny.first_token_even,
        args=trl_ext.DAPOConfig(
            **tiny.cpu_settings(
                output_dir,
                per_device_train_batch_size=16 // processes,
                gradient_accumulation_steps=1,
                updates_per_generation=2,
                max_steps=4,
                save_strategy="steps",
                save_steps=1,
            )
        ),
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return {"weights": weights(trainer), "run": trainer.run_state(), "step": trainer.state.global_step}


class FailsOnLastProcess:
    """A reward function that breaks on one process only, at its second call."""

    __name__ = "fails_on_last_process"

    def __init__(self, rank: int, last: int) -> None:
        self.fails = rank == last
        self.calls = 0

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.calls += 1
        if self.fails and self.calls == 2:
            raise KeyError("no such answer")
        return tiny.first_token_even(completion_ids)


def fail(output_dir: Path, processes: int) -> dict[str, Any]:
    config = trl_ext.DUPOConfig(**tiny.cpu_settings(output_dir, num_generations=4, per_device_train_batch_size=4))
    trainer = trl_ext.DUPOTrainer(
        model=tiny.qwen2(),
        reward_funcs=FailsOnLastProcess(config.process_index, processes - 1),
        args=config,
        train_dataset=tiny.prompts(64),
        processing_class=tiny.tokenizer(),
    )
    trainer.args.max_steps = 9
    try:
        trainer.train()
    except trl_ext.RewardFunctionError as error:
        return {"error": str(error), "saved": [path.name for path in output_dir.glob("checkpoint-*")]}
    return {"error": None, "saved": []}


if __name__ == "__main__":
    results_dir = Path(sys.argv[1])
    # Before torch.distributed is there, the launcher's environment says how many
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = train(case, results_dir / f"out_{name}_{world}", world)
    for name, case in FIT_CASES.items():
        # TRL's deal differs between one process and two, so a step takes a whole generation batch
        for fitted in (True, False):
            results[f"fit_{name}_{fitted}"] = fit(
                case, results_dir / f"out_fit_{name}_{fitted}_{world}", world, fitted
            )
    if world == 1:  # the launch that comes first
        tiny.stopping().save_pretrained(results_dir / "stopping")
    for name, case in RLOO_CASES.items():
        for whose, method in {"theirs": trl.RLOOTrainer, "ours": trl_ext.RLOOTrainer}.items():
            results[f"rloo_{name}_{whose}"] = rloo(case, results_dir / f"out_rloo_{name}_{world}", world, method)
    for name, case in PPO_CASES.items():
        results[f"ppo_{name}"] = ppo(case, results_dir / f"out_ppo_{name}_{world}", world)
    whole = results_dir / f"out_whole_{world}"
    results["whole"] = resume(whole, world, None)
    results["resumed"] = resume(results_dir / f"out_resumed_{world}", world, str(whole / "checkpoint-3"))
    if world > 1:
        # The checkpoint that one process wrote
        alone = results_dir / "out_whole_1" / "checkpoint-3"
        results["other_world"] = resume(results_dir / "out_other_world", world, str(alone))
    results["fault"] = fail(results_dir / f"out_fault_{world}", world)
    torch.save(results, results_dir / f"results_{world}_{rank}.pt")
    tiny.leave()
