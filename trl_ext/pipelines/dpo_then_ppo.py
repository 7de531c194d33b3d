"""
DPO first, PPO later: preferences bring a policy near what is wanted fast and without a critic, and a policy that is
near gives rewards something to choose from. One launch, one trunk in memory, one adapter handed on.

A round is

1. *pairs*: given, or sampled from the policy as it is and judged by the rewards; cleaned, if asked for;
2. *DPO* on them, until preference accuracy stays above a threshold, or to its last step;
3. *PPO*, or any other trainer of the engine, from DPO's adapter.

Further rounds make their pairs from the policy that the last one left, as in iterative DPO
(https://huggingface.co/papers/2312.16682). DPO's reference is the policy at the start of its round, so that a round
learns what is new in its pairs.
"""

import copy
import functools
import gc
import inspect
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env, set_seed
from datasets import Dataset, load_from_disk
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOConfig as TRLDPOConfig

from ..curriculum.schedule import DifficultyCurriculum
from ..errors import require
from ..evaluation.held_out import Estimate, HeldOut, evaluate_policy, read_estimates
from ..monitors.health import PreferenceAccuracyCheck
from ..preferences.cleaning import CleaningReport, clean_by_cross_fitting
from ..preferences.noise import FEWEST_PAIRS
from ..preferences.pairs import NoPairsError, make_pairs
from ..preferences.scorers import ImplicitRewardScorer, ImplicitRewardTraining
from ..rewards.implicit import ImplicitReward
from ..roles.critic import CRITIC
from ..roles.trunk import ADAPTER, gathered, load_adapter, save_adapter, sharing_weights
from ..trainers.dpo import DPOConfig, DPOTrainer
from ..trainers.grpo import GRPOTrainer
from ..trainers.ppo import PPOTrainer
from ..trainers.seams.grpo import saved_state
from .stages import DATA, DPO, PAIRS, POLICY, START, StageFile, StageResult, fingerprint, settings_of, whole_checkpoint


IMPLICIT_REWARD = "implicit_reward"
CROSS_FITTING = "cross_fitting"
BASE, DPO_POLICY = "base", "dpo"
ACCURACY = "rewards/accuracies"  # TRL's key
REFERENCE_ADAPTER = "ref"  # TRL's name for the copy of an adapter that it makes
FILES_OF_A_RUN = (*("optimizer", "scheduler", "rng_state", "trl_ext_", "training_args", "README", TRAINER_STATE_NAME),)
# Far apart, because `make_pairs` adds the row to the seed
SEEDS_OF_A_ROUND = 1_000_003

Prepare = Callable[[str, Any], None]
Clean = Callable[[Dataset], tuple[Dataset, Any]]


class StageStoppedError(RuntimeError):
    """A stage ended before its last step, and not because its pairs were learned. What was trained is saved."""


class StaysAbove(TrainerCallback):
    """
    Ends DPO once preference accuracy has been above a threshold in several logs in a row.

    Args:
        threshold (`float`):
            In (0, 1).
        logs (`int`):
            In a row.
        metric (`str`):
            Their key.
    """

    def __init__(self, threshold: float, logs: int, metric: str = ACCURACY) -> None:
        self.logs = logs
        self.check = PreferenceAccuracyCheck(threshold, metric, patience=logs, grace=0.0)

    def reached(self, state: TrainerState) -> bool:
        """Whether the logs of a run say so."""
        self.check.reset()
        for entry in state.log_history:
            self.check.observe(entry, int(entry.get("step", 0)), state.max_steps)
        return self.check.healthy_logs >= self.logs

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= self.reached(state)


class DPOThenPPO:
    """
    The whole schedule. Kill it anywhere, and the same call goes on where it was: with the stage that isn't finished,
    from its last whole checkpoint (`save_steps` of its configuration), to the same weights. Settings of a stage that
    hasn't begun may be others then: a smaller batch, after PPO found no room. Each stage has a folder of its own,
    `round_1/dpo` for example, with what its trainer writes; the last adapter is also in `output_dir` itself.

    ```python
    run = DPOThenPPO(
        "Qwen/Qwen2.5-0.5B-Instruct",
        accuracy_reward,
        dataset,
        output_dir="out",
        dpo_args=DPOConfig("out", max_steps=200),
        policy_args=PPOConfig("out", max_steps=500),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    run.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Loaded once. Every trainer gets modules of its own around the same weights.
        reward_funcs (`Callable`, `str`, model, or a `list` of them):
            What the second stage maximises, as [`~trl.GRPOTrainer`] takes it, and what judges the completions that
            pairs are made of. `"implicit_reward"` stands for the reward that DPO has learned, β·log π/π_ref; it judges
            no pairs. `reward_weights` of `policy_args` make a weighted sum of several.
        train_dataset ([`~datasets.Dataset`]):
            Prompts.
        output_dir (`str` or `Path`):
            Of the run. `output_dir` and `push_to_hub` of the two configurations aren't used.
        dpo_args ([`DPOConfig`]):
            Of stage 1. Its steps, or epochs, are the limit. Every log is a measurement of preference accuracy.
        policy_args ([`PPOConfig`], or that of `policy_trainer`):
            Of stage 2.
        pairs ([`~datasets.Dataset`], *optional*):
            For DPO, in round 1. `None`: made from the policy.
        eval_pairs ([`~datasets.Dataset`], *optional*):
            Held-out pairs, for `eval_strategy` of `dpo_args`. Their accuracy then decides when DPO ends.
        pair_settings (`Mapping[str, Any]`, *optional*):
            Arguments of [`~trl_ext.preferences.pairs.make_pairs`], and `prompts`, the number of prompts of a round,
            drawn anew in each. `None`: `make_pairs`' defaults, all prompts.
        clean (`str` or `Callable[[Dataset], tuple[Dataset, report]]`, *optional*):
            Applied to pairs before DPO: `"cross_fitting"`, by
            [`~trl_ext.preferences.cleaning.clean_by_cross_fitting`] with scorers that `dpo_args` trains, each an
            adapter on the same trunk; or a function, for example
            [`~trl_ext.preferences.cleaning.clean_by_margin`] with its scorer bound. What the report's `str` says is
            printed and kept in `cleaning.txt`.
        dpo_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of [`DPOTrainer`], such as `curriculum`: made pairs have a column `score_margin`.
        policy_trainer (`type`, *optional*, defaults to [`PPOTrainer`]):
            Of stage 2: any trainer of the engine.
        policy_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of it, such as `reward_model`, `value_model` or `curriculum`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Of the adapter. Required unless `model` has one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, by default the model's.
        model_init_kwargs (`Mapping[str, Any]`, *optional*):
            For a model that is named: arguments of `from_pretrained`, by default those of `policy_args`. It is loaded
            in float32 unless they say otherwise, as by TRL.
        reference (`str`, *optional*, defaults to `"base"`):
            Of stage 2, where it has one: `"base"`, the model without adapter, or `"dpo"`, what stage 1 left.
        rounds (`int`, *optional*, defaults to `1`):
            Of pairs, DPO and stage 2. A critic goes on with the weights of the round before. A finished run goes on if
            it is called with more.
        accuracy_threshold (`float`, *optional*, defaults to `0.75`):
            Of preference accuracy, in (0, 1). `None`: DPO runs to its last step.
        accuracy_logs (`int`, *optional*, defaults to `5`):
            Logs in a row that have to be above it.
        held_out ([`~datasets.Dataset`], *optional*):
            Prompts on which the policy is measured at the start and after each stage.
        held_out_samples (`int`, *optional*, defaults to `4`):
            Completions of each.
        held_out_every (`int`, *optional*, defaults to `0`):
            In stage 2 also every so many optimizer steps.
        held_out_seed (`int`, *optional*, defaults to `0`):
            Of the samples.
        prepare (`Callable[[str, trainer], None]`, *optional*):
            Called with `"dpo"`, or the name of the second method, and each trainer before it trains: to add callbacks,
            health checks, [`~trl_ext.rewards.objectives.RewardObjectives`].

    Raises:
        ValueError: before a model is loaded, for what can't work together, or if `output_dir` holds a run with other
            settings of what has begun.
        TypeError: for a configuration or trainer of another kind.
        StageStoppedError: in training, if a callback (a health check with `stop=True`) or a signal ends a stage before
            its last step.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        train_dataset: Dataset,
        *,
        output_dir: str | Path,
        dpo_args: TRLDPOConfig,
        policy_args: Any,
        pairs: Dataset | None = None,
        eval_pairs: Dataset | None = None,
        pair_settings: Mapping[str, Any] | None = None,
        clean: Clean | str | None = None,
        dpo_kwargs: Mapping[str, Any] | None = None,
        policy_trainer: type[GRPOTrainer] = PPOTrainer,
        policy_kwargs: Mapping[str, Any] | None = None,
        peft_config: Any = None,
        processing_class: Any = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        reference: str = BASE,
        rounds: int = 1,
        accuracy_threshold: float | None = 0.75,
        accuracy_logs: int = 5,
        held_out: Dataset | None = None,
        held_out_samples: int = 4,
        held_out_every: int = 0,
        held_out_seed: int = 0,
        prepare: Prepare | None = None,
    ) -> None:
        if not (isinstance(policy_trainer, type) and issubclass(policy_trainer, GRPOTrainer)):
            raise TypeError(f"policy_trainer is {policy_trainer!r}. Pass a class of trl_ext's, such as PPOTrainer.")
        self.dpo_args = DPOConfig.adopt(dpo_args)
        self.policy_args = policy_trainer.config_class.adopt(policy_args)
        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        # PEFT writes into the one that it uses
        self.model, self.peft_config, self.processing_class = model, copy.deepcopy(peft_config), processing_class
        of_args: Any = self.policy_args.model_init_kwargs  # a mapping, once TRL has read it
        self.model_init_kwargs = dict(model_init_kwargs or of_args or {})
        self.train_dataset, self.pairs, self.eval_pairs = train_dataset, pairs, eval_pairs
        self.pair_settings, self.clean = dict(pair_settings or {}), clean
        self.policy_trainer = policy_trainer
        # An object that learns in a run learns in this one alone: each trainer gets a copy
        self.dpo_kwargs, self.policy_kwargs = dict(dpo_kwargs or {}), dict(policy_kwargs or {})
        self.reference, self.rounds = reference, rounds
        self.accuracy_threshold, self.accuracy_logs = accuracy_threshold, accuracy_logs
        self.held_out, self.held_out_samples = held_out, held_out_samples
        self.held_out_every, self.held_out_seed = held_out_every, held_out_seed
        self.prepare = prepare
        self.output_dir = Path(output_dir)
        self.method = policy_trainer._name.lower()
        self._check()
        self._check_data_and_rewards()
        self._policy: Any = None  # the one model, with its adapter
        self.file = StageFile(self.output_dir, self._settings())

    @property
    def stages(self) -> list[StageResult]:
        """What is finished, in order; the policy as it came first, where it was measured."""
        return self.file.stages

    def _check(self) -> None:
        adapted = isinstance(self.model, PeftModel)
        require(
            adapted != (self.peft_config is not None),
            "`peft_config` and a model that has an adapter: pass one of them."
            if adapted
            else "`peft_config` is missing: what DPO hands to the next stage is an adapter. Pass a LoraConfig.",
        )
        require(
            not adapted or any(weight.requires_grad for weight in self.model.parameters()),
            "Nothing of the model's adapter can be trained. Load it with PeftModel.from_pretrained(..., "
            "is_trainable=True).",
        )
        require(
            not adapted or list(self.model.peft_config) == [ADAPTER],
            f"The model has the adapters {list(getattr(self.model, 'peft_config', {}))}. Bring one, {ADAPTER!r}.",
        )
        require(
            self.reference in (BASE, DPO_POLICY),
            f"reference={self.reference!r} is unknown. Choose {BASE!r} or {DPO_POLICY!r}.",
        )
        require(
            self.reference == DPO_POLICY or not self.policy_args.sync_ref_model,
            f"sync_ref_model refreshes a copy of the adapter, and reference={BASE!r} has none. Set "
            f"reference={DPO_POLICY!r}.",
        )
        require(
            not isinstance(self.clean, str) or self.clean == CROSS_FITTING,
            f"clean={self.clean!r} is unknown. Choose {CROSS_FITTING!r}, or pass a function.",
        )
        require(self.rounds >= 1, f"rounds={self.rounds} must be at least 1.")
        require(not self.output_dir.is_file(), f"output_dir={str(self.output_dir)!r} is a file. Name a folder.")
        require(
            self.accuracy_threshold is None or 0 < self.accuracy_threshold < 1,
            f"accuracy_threshold={self.accuracy_threshold} is a share of pairs and must be in (0, 1), or None.",
        )
        require(self.accuracy_logs >= 1, f"accuracy_logs={self.accuracy_logs} must be at least 1.")
        require(
            self.dpo_args.eval_strategy == "no" or self.eval_pairs is not None,
            "eval_strategy of dpo_args needs eval_pairs. Pass them, or set it to 'no'.",
        )
        require(
            self.eval_pairs is None or self.dpo_args.eval_strategy != "no",
            "eval_pairs are there, but dpo_args never evaluates. Set its eval_strategy, or leave them out.",
        )
        require(
            self.accuracy_threshold is None or self.dpo_args.logging_strategy != "no",
            "accuracy_threshold is compared with logs, and logging_strategy of dpo_args is 'no'. Set it to 'steps', "
            "or accuracy_threshold to None.",
        )
        for name, args in (("dpo_args", self.dpo_args), ("policy_args", self.policy_args)):
            require(
                not args.save_only_model,
                f"save_only_model of {name}: nothing could go on from such a checkpoint. Set it to False.",
            )
            require(
                not args.load_best_model_at_end,
                f"load_best_model_at_end of {name}: a stage hands on what it has at its end. Set it to False.",
            )
        require(
            self.policy_args.eval_strategy == "no" or self.policy_kwargs.get("eval_dataset") is not None,
            "eval_strategy of policy_args needs an eval_dataset in policy_kwargs. Pass it, or set it to 'no'.",
        )
        require(
            not (self.policy_args.fsdp or self.dpo_args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")),
            "FSDP wraps a model for good, so that no second trainer can have it. Use DeepSpeed or DDP, or run the "
            "recipes one after the other.",
        )
        require(
            not is_deepspeed_zero3_enabled()
            or not (IMPLICIT_REWARD in self.reward_funcs or self.clean == CROSS_FITTING),
            f"{IMPLICIT_REWARD!r} and clean={CROSS_FITTING!r} score with whole adapters, and ZeRO-3 spreads them over "
            "processes. Use ZeRO-2, or leave them out.",
        )

    def _check_data_and_rewards(self) -> None:
        samples_pairs = self.pairs is None or self.rounds > 1
        require(
            self._judges or not (samples_pairs or self.held_out is not None),
            f"{IMPLICIT_REWARD!r} is what DPO learns from pairs: it can't judge those it learns from, nor the "
            "start. Pass pairs (and rounds=1, no held_out), or another reward.",
        )
        of_pairs = {"chosen", "rejected"} | ({"prompt"} if self.clean == CROSS_FITTING else set())
        for name, dataset, columns in (
            ("train_dataset", self.train_dataset, {"prompt"}),
            ("pairs", self.pairs, of_pairs),
            ("eval_pairs", self.eval_pairs, {"chosen", "rejected"}),
            ("held_out", self.held_out, {"prompt"}),
        ):
            require(
                dataset is None or isinstance(dataset, Dataset),
                f"{name} is a {type(dataset).__name__}, which can't be read again after a kill. Load it as a Dataset.",
            )
            missing = columns - set(dataset.column_names) if dataset is not None else set()
            require(not missing, f"{name} lacks the columns {sorted(missing)}.")
            require(dataset is None or len(dataset) > 0, f"{name} has no rows.")
        few = self.clean == CROSS_FITTING and self.pairs is not None and len(self.pairs) < FEWEST_PAIRS
        require(
            not few,
            f"clean={CROSS_FITTING!r} tells the share of wrong labels from {FEWEST_PAIRS} pairs on. Pass more, or "
            "leave it out.",
        )
        known = {"prompts", *inspect.signature(make_pairs).parameters}
        known -= {"trainer", "dataset", "partial_results", "on_progress"}
        unknown = sorted(self.pair_settings.keys() - known)
        require(not unknown, f"pair_settings has {unknown}. Choose of {', '.join(sorted(known))}.")
        weights = self.policy_args.reward_weights
        count = len(self.reward_funcs) + (self._reward_model is not None)
        require(
            weights is None or len(weights) == count,
            f"reward_weights of policy_args has {len(weights or [])} numbers for {count} rewards.",
        )

    @property
    def _judges(self) -> bool:
        """Whether a reward is there before DPO has learned one."""
        return self._reward_model is not None or any(reward != IMPLICIT_REWARD for reward in self.reward_funcs)

    @property
    def _reward_model(self) -> Any:
        return self.policy_kwargs.get("reward_model")

    def _settings(self) -> dict[str, dict[str, Any]]:
        """What the result depends on, as far as it can be told, by the stage that it decides first."""
        given = {
            stage: {f"{stage}_kwargs": {name: _said(value) for name, value in kwargs.items() if value is not None}}
            for stage, kwargs in ((DPO, self.dpo_kwargs), (POLICY, self.policy_kwargs))
        }
        return {
            START: {
                "model": self.model if isinstance(self.model, str) else self.model.config.name_or_path,
                "model_init_kwargs": self.model_init_kwargs,
                "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
                "dpo_args.seed": self.dpo_args.seed,  # of a new adapter
            },
            DATA: {
                "rewards": [_said(reward) for reward in self.reward_funcs],
                "reward_model": _said(self._reward_model),
                "train_dataset": fingerprint(self.train_dataset),
                "pairs": fingerprint(self.pairs),
            },
            PAIRS: {"pair_settings": self.pair_settings, "clean": _said(self.clean)},
            DPO: {
                "accuracy_threshold": self.accuracy_threshold,
                "accuracy_logs": self.accuracy_logs,
                "eval_pairs": fingerprint(self.eval_pairs),
                **given[DPO],
                **settings_of(self.dpo_args, "dpo_args"),
            },
            POLICY: {
                "policy_trainer": self.policy_trainer.__name__,
                "reference": self.reference,
                **given[POLICY],
                **settings_of(self.policy_args, "policy_args"),
            },
        }

    # The run

    def train(self) -> list[StageResult]:
        """
        Runs what isn't finished yet.

        Returns:
            `list[StageResult]`: [`stages`].
        """
        if self.file.changed:
            self._print(f"goes on with other settings of what hasn't begun: {'; '.join(self.file.changed)}")
        if self.file.changed or not self.file.stages:
            self.file.save()
        for round_ in range(1, self.rounds + 1):
            for name, run in ((PAIRS, self._make_pairs), (DPO, self._dpo), (self.method, self._improve)):
                if self.file.find(name, round_) is None:
                    self._announce(name, round_)
                    run(round_)
            self._keep_result()
        return self.stages

    def _announce(self, name: str, round_: int) -> None:
        checkpoint = whole_checkpoint(self._folder(name, round_))
        which = f"round {round_} of {self.rounds} · {name}" if self.rounds > 1 else name
        self._print(f"{which}, {'from its start' if checkpoint is None else f'from {checkpoint.name}'}")

    def _make_pairs(self, round_: int) -> None:
        started, folder = time.monotonic(), self._folder(PAIRS, round_)
        given = self.pairs if round_ == 1 else None
        tokens = 0
        measures = round_ == 1 and self.held_out is not None and self.file.find(START, 0) is None
        # What stage 2 can't work with is told before DPO has trained, except where it would start an engine for that
        tries = round_ == 1 and self._judges and not self.policy_args.use_vllm
        if given is None or measures or tries:
            trainer = self._sampler(folder)
            if round_ == 1:
                self._measure_start(trainer)
            if given is None:
                given, tokens = self._sampled_pairs(trainer, folder, round_)
            self._release(trainer)
        if self.clean is not None:
            set_seed(self.dpo_args.seed)  # for scorers that are trained
            cleaned = self._cross_fitted(given) if isinstance(self.clean, str) else self.clean(given)
            if not (isinstance(cleaned, tuple) and len(cleaned) == 2 and isinstance(cleaned[0], Dataset)):
                raise TypeError(f"clean returned a {type(cleaned).__name__}. Let it return the pairs and a report.")
            before, (given, report) = len(given), cleaned
            self._print(str(report))
            if len(given) == 0:
                raise ValueError(f"Cleaning left none of {before} pairs:\n{report}\nClean less, or make others.")
            if PartialState().is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "cleaning.txt").write_text(f"{report}\n", encoding="utf-8")
        if given is not self.pairs:
            self._write_pairs(given, folder)
        seconds = time.monotonic() - started
        self.file.finish(StageResult(PAIRS, round_, str(folder), generated_tokens=tokens, seconds=seconds))

    def _sampled_pairs(self, trainer: GRPOTrainer, folder: Path, round_: int) -> tuple[Dataset, int]:
        prompts, settings, seed = self.train_dataset, dict(self.pair_settings), self.policy_args.seed
        count = settings.pop("prompts", None)
        num_generations = settings.get("num_generations") or trainer.num_generations
        if count is not None:
            prompts = prompts.shuffle(seed=seed + round_).take(min(count, len(prompts)))
        settings.setdefault("seed", seed + SEEDS_OF_A_ROUND * round_)
        settings.setdefault("batch_size", self._prompts_at_once(num_generations))
        try:
            made, report = make_pairs(
                trainer,
                prompts,
                partial_results=folder / "completions.jsonl",
                on_progress=lambda done, rows: self._print(f"sampled for {done} of {rows} prompts"),
                **settings,
            )
        except NoPairsError as error:
            if round_ > 1:
                before = round_ - 1
                error.add_note(f"What round {before} left is in {self.output_dir}; rounds={before} ends there.")
            raise
        self._print(str(report))
        if PartialState().is_main_process:
            report.save(folder / "report.json")
        return made, report.generated_tokens

    def _cross_fitted(self, given: Dataset) -> tuple[Dataset, CleaningReport]:
        args = {f.name: getattr(self.dpo_args, f.name) for f in fields(TRLDPOConfig) if f.init}

        def fit(others: Dataset) -> ImplicitRewardScorer:
            AcceleratorState._reset_state()
            trunk = sharing_weights(self.policy).unload()
            return ImplicitRewardTraining(
                trunk, args, self.policy.peft_config[ADAPTER], self.tokenizer, self.dpo_args.per_device_eval_batch_size
            )(others)

        return clean_by_cross_fitting(
            given,
            fit,
            seed=self.dpo_args.seed,
            on_progress=lambda done, folds: self._print(f"trained scorer {done} of {folds}"),
        )

    def _dpo(self, round_: int) -> None:
        started, folder = time.monotonic(), self._folder(DPO, round_)
        args = self._args(self.dpo_args, folder)
        trainer = self._trained_alone(
            lambda: DPOTrainer(
                model=sharing_weights(self.policy),
                args=args,
                train_dataset=self._pairs_of(round_),
                eval_dataset=self.eval_pairs,
                processing_class=self.tokenizer,
                **_own(self.dpo_kwargs),
            ),
            args.seed,
        )
        rule, metric = None, ACCURACY if args.eval_strategy == "no" else f"eval_{ACCURACY}"
        if self.accuracy_threshold is not None:
            rule = StaysAbove(self.accuracy_threshold, self.accuracy_logs, metric)
            trainer.add_callback(rule)
        self._train(trainer, DPO, folder, rule)
        state = trainer.state
        logged = [entry[metric] for entry in state.log_history if metric in entry]
        found = f", preference accuracy {logged[-1]:.3f}" if logged else ""
        self._print(f"DPO ended at step {state.global_step} of {state.max_steps}{found}")
        if rule is not None and len(logged) < self.accuracy_logs:
            self._print(
                f"accuracy_threshold asks for {self.accuracy_logs} logs of {metric}, and there were {len(logged)}: "
                "lower accuracy_logs, logging_steps or eval_steps if it is to end DPO."
            )
        self._release(trainer)
        seconds = time.monotonic() - started
        self.file.finish(StageResult(DPO, round_, str(folder), state.global_step, seconds=seconds))

    def _improve(self, round_: int) -> None:
        started, folder = time.monotonic(), self._folder(self.method, round_)
        args = self._args(self.policy_args, folder)
        rewards = [
            self._implicit_reward(round_) if reward == IMPLICIT_REWARD else reward for reward in self.reward_funcs
        ]
        trainer = self._trained_alone(lambda: self._policy_trainer_for(args, rewards), args.seed)
        if self.reference == BASE and REFERENCE_ADAPTER in trainer.model.peft_config:
            trainer.model.delete_adapter(REFERENCE_ADAPTER)
        critic, before = getattr(trainer, "critic", None), self._adapter_before(round_) / CRITIC
        if critic is not None and before.is_dir():
            critic.load(before)
        held_out = None
        if self.held_out is not None:
            held_out = HeldOut(trainer, list(self.held_out), every=self.held_out_every, **self._measurement)
            trainer.add_callback(held_out)
        self._train(trainer, self.method, folder, None, held_out)
        dpo = self.file.find(DPO, round_)
        measured = read_estimates(trainer.state.log_history)
        result = StageResult(self.method, round_, str(folder), trainer.state.global_step)
        if measured:
            assert dpo is not None
            dpo.measured = next(iter(measured.values()))
            result.measured = next(reversed(measured.values()))
        result.generated_tokens = trainer.counters.generated_tokens
        self._release(trainer)
        result.seconds = time.monotonic() - started
        self.file.finish(result)

    # Trainers

    def _sampler(self, folder: Path) -> GRPOTrainer:
        """The trainer of stage 2, to sample from the policy as it is."""
        args, further = self._args(self.policy_args, folder), dict(self.policy_kwargs)
        judges = [reward != IMPLICIT_REWARD for reward in self.reward_funcs]

        def of_judges(values: list[Any]) -> list[Any]:  # a reward model comes last
            return [value for i, value in enumerate(values) if i >= len(judges) or judges[i]]

        if args.reward_weights is not None:
            args.reward_weights = of_judges(args.reward_weights)
        if args.outcome_reward_funcs is not None:
            args.outcome_reward_funcs = [name for name in args.outcome_reward_funcs if name != IMPLICIT_REWARD] or None
        if isinstance(further.get("reward_processing_classes"), list):
            further["reward_processing_classes"] = of_judges(further["reward_processing_classes"])
        rewards = of_judges(self.reward_funcs)
        return self._trained_alone(lambda: self._policy_trainer_for(args, rewards, further), args.seed)

    def _policy_trainer_for(
        self, args: Any, rewards: list[Any], further: Mapping[str, Any] | None = None
    ) -> GRPOTrainer:
        further = self.policy_kwargs if further is None else further
        return self.policy_trainer(
            model=sharing_weights(self.policy),
            reward_funcs=rewards,
            args=args,
            train_dataset=self.train_dataset,
            processing_class=self.tokenizer,
            **_own(further),
        )

    def _args(self, args: Any, folder: Path) -> Any:
        """A stage's own configuration. What is published is the result of the last one."""
        own = copy.copy(args)
        own.output_dir, own.push_to_hub, own.resume_from_checkpoint = str(folder), False, None
        return own

    def _trained_alone(self, build: Callable[[], Any], seed: int) -> Any:
        """A trainer that doesn't depend on what ran before it in this process."""
        changed = False
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(name in self._trainable)
            if parameter.dtype != self._dtypes[name] and not hasattr(parameter, "ds_id"):
                parameter.data, changed = parameter.data.to(self._dtypes[name]), True
        if changed:  # by generation, or an engine
            load_adapter(self.policy, self._adapter_now())
        AcceleratorState._reset_state()  # which takes one DeepSpeed configuration only, and each stage has its own
        set_seed(seed)
        with gathered(self.policy):  # where TRL copies its adapter
            trainer = build()
        if not any(hasattr(parameter, "ds_id") for parameter in self.policy.parameters()):
            trainer.model.to(trainer.accelerator.device)  # DeepSpeed would do it when it trains
        return trainer

    def _train(
        self, trainer: Any, name: str, folder: Path, rule: StaysAbove | None, held_out: HeldOut | None = None
    ) -> None:
        """Trains to the stage's end, from its last whole checkpoint, and leaves the result in its folder."""
        if self.prepare is not None:
            self.prepare(name, trainer)

        def is_over(state: TrainerState) -> bool:
            return state.global_step >= state.max_steps or (rule is not None and rule.reached(state))

        checkpoint = whole_checkpoint(folder)
        state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if checkpoint is not None and state is not None and is_over(state):
            self._take_over(trainer, folder, checkpoint, state, held_out)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if not is_over(trainer.state):
                raise StageStoppedError(
                    f"{name} was stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, by a "
                    "callback or a signal. The same call goes on from its last checkpoint."
                )
            trainer.save_model(str(folder))
        trainer.save_state()

    @staticmethod
    def _take_over(
        trainer: Any, folder: Path, checkpoint: Path, state: TrainerState, held_out: HeldOut | None
    ) -> None:
        """A stage that was killed between its last step and its end: transformers would train one step more."""
        trainer.state = state
        if PartialState().is_main_process:
            _copy_model(checkpoint, folder)
        PartialState().wait_for_everyone()
        load_adapter(trainer.model, checkpoint)
        if isinstance(trainer, GRPOTrainer):
            trainer.load_run_state(saved_state(checkpoint)["run"])
        if getattr(trainer, "critic", None) is not None:
            trainer.critic.load(checkpoint / CRITIC)
        if held_out is not None:
            held_out.measured = read_estimates(state.log_history)
            if state.global_step not in held_out.measured:
                held_out.measure(state)

    def _release(self, trainer: Any) -> None:
        """Lets go of a trainer, and of all that it put around the weights."""
        trainer.accelerator.free_memory()
        trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
        trainer.callback_handler.model = trainer.callback_handler.optimizer = None
        trainer.callback_handler.callbacks.clear()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    # Models

    @property
    def policy(self) -> PeftModel:
        """The model with its adapter, as the last finished stage left it. Loaded when it is first asked for."""
        if self._policy is None:
            self._policy = self._load()
            self._trainable = {name for name, weight in self._policy.named_parameters() if weight.requires_grad}
            self._dtypes = {name: weight.dtype for name, weight in self._policy.named_parameters()}
        return self._policy

    def _load(self) -> PeftModel:
        model = self.model
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **self.model_init_kwargs})
        if not isinstance(model, PeftModel):
            set_seed(self.dpo_args.seed)
            model = get_peft_model(model, self.peft_config)
        start, main = self._folder(START, 0), PartialState()
        if (start / "adapter_config.json").is_file():
            load_adapter(model, self._adapter_now())
        elif main.is_main_process:
            partial = start.with_name(f"{start.name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            save_adapter(model, partial)
            partial.rename(start)
        main.wait_for_everyone()
        return model

    def _adapter_now(self) -> Path:
        trained = [stage.folder for stage in self.stages if stage.name in (DPO, self.method)]
        return Path(trained[-1]) if trained else self._folder(START, 0)

    def _adapter_before(self, round_: int) -> Path:
        return self._folder(self.method, round_ - 1) if round_ > 1 else self._folder(START, 0)

    def _implicit_reward(self, round_: int) -> ImplicitReward:
        """What DPO of this round has learned: the same in a process that saw it, and in one that goes on later."""
        judge = sharing_weights(self.policy)
        judge.add_adapter(REFERENCE_ADAPTER, judge.peft_config[ADAPTER])
        load_adapter(judge, self._adapter_before(round_), REFERENCE_ADAPTER)
        judge.to(PartialState().device)
        template: Any = self.policy_args.chat_template_kwargs
        return ImplicitReward(
            judge,
            None,
            self.dpo_args.beta,
            self.tokenizer,
            batch_size=self.policy_args.per_device_train_batch_size,
            reference_adapter=REFERENCE_ADAPTER,
            snapshot=True,
            chat_template_kwargs=template,
            name=IMPLICIT_REWARD,
        )

    @property
    def tokenizer(self) -> Any:
        """Of all stages."""
        if self.processing_class is None:
            name = self.model if isinstance(self.model, str) else self.model.config.name_or_path
            self.processing_class = AutoTokenizer.from_pretrained(name)
        return self.processing_class

    # Measurements and files

    @property
    def _measurement(self) -> dict[str, Any]:
        samples = self.held_out_samples
        return {"num_samples": samples, "batch_size": self._prompts_at_once(samples), "seed": self.held_out_seed}

    def _prompts_at_once(self, samples: int) -> int:
        """As many as give a generation batch of stage 2, if each has so many completions."""
        return max(1, int(self.policy_args.generation_batch_size or 1) // samples)

    def _measure_start(self, trainer: GRPOTrainer) -> None:
        if self.held_out is not None and self.file.find(START, 0) is None:
            measured = evaluate_policy(trainer, list(self.held_out), **self._measurement)
            self.file.finish(StageResult(START, 0, str(self._folder(START, 0)), measured=measured))
            self._print(_told(measured))

    def _pairs_of(self, round_: int) -> Dataset:
        folder = self._folder(PAIRS, round_)
        if not (folder / "pairs").is_dir():
            assert self.pairs is not None
            return self.pairs
        pairs = load_from_disk(str(folder / "pairs"))
        assert isinstance(pairs, Dataset)
        return pairs

    def _write_pairs(self, pairs: Dataset, folder: Path) -> None:
        main = PartialState()
        if main.is_main_process:
            target, partial = folder / "pairs", folder / "pairs.part"
            for path in (target, partial):
                shutil.rmtree(path, ignore_errors=True)
            pairs.save_to_disk(str(partial))
            partial.rename(target)
        main.wait_for_everyone()

    def _keep_result(self) -> None:
        """The last round's adapter, its tokenizer and its critic, where the run was asked to leave them."""
        main, last = PartialState(), [stage.folder for stage in self.stages if stage.name == self.method][-1]
        if main.is_main_process:
            _copy_model(Path(last), self.output_dir)
        main.wait_for_everyone()

    def _folder(self, name: str, round_: int) -> Path:
        folder = self.output_dir / (START if name == START else f"round_{round_}/{name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def _print(self, text: str) -> None:
        PartialState().print(text, flush=True)


def _copy_model(source: Path, target: Path) -> None:
    """Adapter, tokenizer and critic; not what only the run that wrote them needs."""
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(FILES_OF_A_RUN):
            shutil.copy2(path, target / path.name)
    if (source / CRITIC).is_dir():
        shutil.copytree(source / CRITIC, target / CRITIC, dirs_exist_ok=True)


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) if name == "curriculum" else value for name, value in arguments.items()}


def _said(value: Any) -> Any:
    """What can be told of a value from one process to the next."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_said(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _said(item) for name, item in value.items()}
    if isinstance(value, Dataset):
        return fingerprint(value)
    if isinstance(value, DifficultyCurriculum):
        return repr(value)
    if isinstance(value, functools.partial):
        return [_said(value.func), _said(value.args), _said(value.keywords)]
    return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__name__)


def _told(measured: Mapping[str, Estimate]) -> str:
    return ", ".join(f"held-out {name} {e.mean:.3f} ({e.low:.3f} to {e.high:.3f})" for name, e in measured.items())
