"""
DPO first, PPO later. Preferences bring a policy close to the wanted behaviour quickly and without a critic; a policy
that is close gives rewards something to choose from. One launch, one model in memory, one adapter that every stage
trains further.

A round has three stages:

1. *pairs*: given, or sampled from the current policy and judged by the rewards, and cleaned if wanted;
2. *DPO* on the pairs, until preference accuracy stays above a threshold, or to its last step;
3. *PPO*, or the method of any other trainer of `trl_ext`, starting from DPO's adapter.

Further rounds make their pairs from the policy of the round before, as in iterative DPO
(https://huggingface.co/papers/2312.16682). DPO's reference is the policy at the start of its own round.
"""

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig as TRLDPOConfig

from ..evaluation.held_out import HeldOut, evaluate_policy, read_estimates
from ..evaluation.held_out_texts import HELD_OUT_TEXTS, PromptTexts, write_texts
from ..metric_keys import EVALUATION, PREFERENCE_ACCURACY
from ..preferences.pairs import NoPairsError
from ..rewards.implicit import IMPLICIT_REWARD, ImplicitReward
from ..roles.critic import CRITIC
from ..roles.trunk import ADAPTER, REFERENCE_ADAPTER, load_adapter
from ..trainers.argument_checks import check_policy
from ..trainers.dpo import DPOConfig, DPOTrainer
from ..trainers.grpo import GRPOTrainer
from ..trainers.ppo import PPOTrainer
from ..trainers.reward_checks import as_list
from ..trainers.seams.names import method_name
from ..trainers.value_fitting import fit_values
from .checks import BASE, adopted_as, check_arguments, check_types
from .pairing import (
    Clean,
    clean_pairs,
    cross_fitting,
    prompts_of_round,
    read_pairs,
    sample_pairs,
    scored_completions,
    without_implicit_reward,
    write_pairs,
)
from .settings import described, fingerprint, settings_of
from .shared_policy import SharedPolicy, release
from .stages import DATA, DPO, PAIRS, POLICY, START, StageFile, StageResult, print_once, whole_checkpoint
from .training import StaysAbove, StopsRising, copy_model, train_stage


Prepare = Callable[[str, Any], None]


class DPOThenPPO:
    """
    The whole schedule. It can be killed at any time: the same call continues with the stage that isn't finished, from
    that stage's last complete checkpoint (`save_steps` of its configuration), and arrives at the same weights.
    Settings of stages that haven't begun may then differ, for example a smaller batch size after PPO ran out of
    memory. Each stage has a folder of its own, for example `round_1/dpo`, with everything that its trainer writes. The
    last adapter is also in `output_dir` itself.

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
            The policy. It is loaded once; every trainer gets modules of its own around the same weights.
        reward_funcs (`Callable`, `str`, model, or a `list` of them):
            What the second stage maximises, in every form that [`~trl.GRPOTrainer`] takes, and what judges the
            completions from which pairs are made. `"implicit_reward"` stands for the reward that DPO has learned,
            β·log π/π_ref; it judges no pairs. `reward_weights` of `policy_args` weigh several rewards.
        train_dataset ([`~datasets.Dataset`]):
            Prompts.
        output_dir (`str` or `Path`):
            Folder of the run. `output_dir` and `push_to_hub` of the two configurations are ignored.
        dpo_args ([`DPOConfig`]):
            Configuration of DPO. Its steps or epochs are the upper limit of the stage. Every log is a measurement of
            preference accuracy.
        policy_args ([`PPOConfig`], or the configuration of `policy_trainer`):
            Configuration of the second stage.
        pairs ([`~datasets.Dataset`], *optional*):
            Pairs for DPO in round 1. `None`: they are sampled from the policy.
        eval_pairs ([`~datasets.Dataset`], *optional*):
            Held-out pairs, for `eval_strategy` of `dpo_args`. With them, it is their accuracy that ends DPO.
        pair_settings (`Mapping[str, Any]`, *optional*):
            Arguments of [`~trl_ext.preferences.pairs.make_pairs`], and `prompts`: the number of prompts per round,
            drawn again in each round. `None`: the defaults of `make_pairs`, and all prompts.
        clean (`str` or `Callable[[Dataset], tuple[Dataset, report]]`, *optional*):
            How pairs are cleaned before DPO. `"cross_fitting"`: by
            [`~trl_ext.preferences.cleaning.clean_by_cross_fitting`], with scorers that are trained with `dpo_args`,
            each an adapter on the same model. Or a function, for example
            [`~trl_ext.preferences.cleaning.clean_by_margin`] with its scorer bound. The `str` of the report is printed
            and written to `cleaning.txt`.
        dpo_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of [`DPOTrainer`], such as `curriculum`. Pairs that were sampled have a column
            `score_margin`.
        policy_trainer (`type`, *optional*, defaults to [`PPOTrainer`]):
            Class of the second stage's trainer: any of `trl_ext` that samples.
        policy_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of that trainer, such as `reward_model`, `value_model` or `curriculum`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration of the adapter. Required unless `model` has one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, by default the model's.
        model_init_kwargs (`Mapping[str, Any]`, *optional*):
            Arguments of `from_pretrained` for a model that is given by name, by default those of `policy_args`. As in
            TRL, the model is loaded in float32 unless they say otherwise.
        reference (`str`, *optional*, defaults to `"base"`):
            Reference of the second stage, if it has one: `"base"`, the model without an adapter, or `"dpo"`, the
            policy that DPO left.
        rounds (`int`, *optional*, defaults to `1`):
            Number of rounds. A critic starts each round with its weights from the round before. A finished run is
            continued by a call with more rounds.
        accuracy_threshold (`float`, *optional*, defaults to `0.75`):
            Preference accuracy, in (0, 1), that ends DPO. `None`: DPO runs to its last step.
        accuracy_logs (`int`, *optional*, defaults to `5`):
            How many logs in a row have to be above the threshold.
        dpo_held_out_every (`int`, *optional*, defaults to `0`):
            Optimizer steps of DPO between measurements of its policy on `held_out`. With them, it is the held-out
            reward that ends DPO, not preference accuracy, and the best policy that was measured goes on. 0: none.
        dpo_patience (`int`, *optional*, defaults to `2`):
            How many of these measurements in a row may be no better than the best one.
        fit_critic (`int`, *optional*, defaults to `0`):
            Passes over the completions that were sampled for the pairs of a round, in which the critic is fitted to
            their rewards before the second stage's first step ([`~trl_ext.trainers.value_fitting.fit_values`]): what
            was paid for those rewards is used twice. 0: none. A round whose pairs were given has no such completions.
        held_out ([`~datasets.Dataset`], *optional*):
            Prompts on which the policy is measured at the start, after DPO and after the second stage.
        held_out_samples (`int`, *optional*, defaults to `4`):
            Completions per held-out prompt.
        held_out_every (`int`, *optional*, defaults to `0`):
            Optimizer steps between further measurements in the second stage; 0 for none.
        held_out_seed (`int`, *optional*, defaults to `0`):
            Seed of the held-out completions.
        prepare (`Callable[[str, trainer], None]`, *optional*):
            Called before each training with the name of the stage, `"dpo"` or the method of the second stage, and the
            trainer: to add callbacks, health checks or [`~trl_ext.rewards.objectives.RewardObjectives`].

    Attributes:
        stages (`list[StageResult]`):
            The finished stages, in order.

    Raises:
        ValueError: before a model is loaded, for arguments that can't work together, or if `output_dir` holds a run
            with different settings of a stage that has begun.
        TypeError: for a configuration or a trainer of a different kind.
        StageStoppedError: in training, if a callback (such as a health check with `stop=True`) or a signal stops a
            stage before its end.
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
        dpo_held_out_every: int = 0,
        dpo_patience: int = 2,
        fit_critic: int = 0,
        held_out: Dataset | None = None,
        held_out_samples: int = 4,
        held_out_every: int = 0,
        held_out_seed: int = 0,
        prepare: Prepare | None = None,
    ) -> None:
        if not (isinstance(policy_trainer, type) and issubclass(policy_trainer, GRPOTrainer)):
            raise TypeError(f"policy_trainer is {policy_trainer!r}. Pass a class of trl_ext's, such as PPOTrainer.")
        self.dpo_args = adopted_as("dpo_args", DPOConfig, dpo_args)
        self.policy_args = adopted_as("policy_args", policy_trainer.config_class, policy_args)
        check_policy(model)
        check_types(
            output_dir, peft_config, model_init_kwargs, pair_settings, dpo_kwargs, policy_kwargs, clean, prepare
        )
        self.reward_funcs = as_list(reward_funcs)
        # A copy, because PEFT writes into the configuration that it gets
        self.model, self.peft_config, self.processing_class = model, copy.deepcopy(peft_config), processing_class
        of_args: Any = self.policy_args.model_init_kwargs  # TRL has made a mapping of what may have been a string
        self.model_init_kwargs = dict(model_init_kwargs or of_args or {})
        self.train_dataset, self.pairs, self.eval_pairs = train_dataset, pairs, eval_pairs
        self.pair_settings, self.clean = dict(pair_settings or {}), clean
        self.policy_trainer = policy_trainer
        self.dpo_kwargs, self.policy_kwargs = dict(dpo_kwargs or {}), dict(policy_kwargs or {})
        self.reference, self.rounds = reference, rounds
        self.accuracy_threshold, self.accuracy_logs = accuracy_threshold, accuracy_logs
        self.dpo_held_out_every, self.dpo_patience = dpo_held_out_every, dpo_patience
        self.fit_critic = fit_critic
        self.held_out, self.held_out_samples = held_out, held_out_samples
        self.held_out_every, self.held_out_seed = held_out_every, held_out_seed
        self.prepare = prepare
        self.output_dir = Path(output_dir)
        self.method = method_name(policy_trainer).lower()
        check_arguments(self)
        start = self.output_dir / START
        loading = {"trust_remote_code": self.policy_args.trust_remote_code, **self.model_init_kwargs}
        self._policy = SharedPolicy(model, self.peft_config, loading, self.dpo_args.seed, start, self._latest_adapter)
        self.file = StageFile(self.output_dir, self._settings())

    @property
    def stages(self) -> list[StageResult]:
        """The finished stages, in order. The first is the policy at the start, if it was measured."""
        return self.file.stages

    @property
    def policy(self) -> PeftModel:
        """The model with its adapter, as the last finished stage left it. Loaded at the first access."""
        return self._policy.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of all stages."""
        if self.processing_class is None:
            name = self.model if isinstance(self.model, str) else self.model.config.name_or_path
            trusted = self.policy_args.trust_remote_code
            self.processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
        return self.processing_class

    @property
    def reward_model(self) -> Any:
        """The reward model in `policy_kwargs`, if there is one."""
        return self.policy_kwargs.get("reward_model")

    @property
    def has_judges(self) -> bool:
        """Whether there is a reward other than the one that DPO learns."""
        return self.reward_model is not None or any(reward != IMPLICIT_REWARD for reward in self.reward_funcs)

    def _settings(self) -> dict[str, dict[str, Any]]:
        """Everything on which the result depends, as far as it can be described, by the first stage that uses it."""
        kwargs = {
            stage: {f"{stage}_kwargs": {name: described(value) for name, value in given.items() if value is not None}}
            for stage, given in ((DPO, self.dpo_kwargs), (POLICY, self.policy_kwargs))
        }
        return {
            START: {
                "model": self.model if isinstance(self.model, str) else self.model.config.name_or_path,
                "model_init_kwargs": self.model_init_kwargs,
                "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
                "dpo_args.seed": self.dpo_args.seed,  # of a new adapter
            },
            DATA: {
                "rewards": [described(reward) for reward in self.reward_funcs],
                "reward_model": described(self.reward_model),
                "train_dataset": fingerprint(self.train_dataset),
                "pairs": fingerprint(self.pairs),
            },
            PAIRS: {"pair_settings": self.pair_settings, "clean": described(self.clean)},
            DPO: {
                "accuracy_threshold": self.accuracy_threshold,
                "accuracy_logs": self.accuracy_logs,
                "dpo_held_out_every": self.dpo_held_out_every,
                "dpo_patience": self.dpo_patience,
                "eval_pairs": fingerprint(self.eval_pairs),
                **kwargs[DPO],
                **settings_of(self.dpo_args, "dpo_args"),
            },
            POLICY: {
                "policy_trainer": self.policy_trainer.__name__,
                "reference": self.reference,
                "fit_critic": self.fit_critic,
                **kwargs[POLICY],
                **settings_of(self.policy_args, "policy_args"),
            },
        }

    def train(self) -> list[StageResult]:
        """
        Runs all stages that aren't finished.

        Returns:
            `list[StageResult]`: [`stages`].
        """
        if self.file.changed:
            print_once(f"continues with different settings of stages to come: {'; '.join(self.file.changed)}")
        if self.file.changed or not self.file.stages:
            self.file.save()
        for round_ in range(1, self.rounds + 1):
            for name, run in ((PAIRS, self._make_pairs), (DPO, self._dpo), (self.method, self._improve)):
                if self.file.find(name, round_) is None:
                    self._announce(name, round_)
                    run(round_)
            self._copy_result()
        return self.stages

    def _announce(self, name: str, round_: int) -> None:
        checkpoint = whole_checkpoint(self._folder(name, round_))
        which = f"round {round_} of {self.rounds} · {name}" if self.rounds > 1 else name
        print_once(f"{which}, {'from its start' if checkpoint is None else f'from {checkpoint.name}'}")

    # Pairs

    def _make_pairs(self, round_: int) -> None:
        started, folder = time.monotonic(), self._folder(PAIRS, round_)
        pairs, tokens, seed = self.pairs if round_ == 1 else None, 0, self.policy_args.seed
        measures = round_ == 1 and self.held_out is not None and self.file.find(START, 0) is None
        # The second stage's trainer is also built to find out before DPO what it can't work with, except with vLLM,
        # where that would start an engine
        tries = round_ == 1 and self.has_judges and not self.policy_args.use_vllm
        if pairs is None or measures or tries:
            trainer = self._sampler(folder)
            if measures:
                self._measure_start(trainer)
            if pairs is None:
                batch_size = self._prompts_at_once(
                    self.pair_settings.get("num_generations") or trainer.num_generations
                )
                settings = {"batch_size": batch_size, **self.pair_settings}
                try:
                    pairs, tokens = sample_pairs(trainer, self.train_dataset, settings, folder, round_, seed)
                except NoPairsError as error:
                    if round_ > 1:
                        before = round_ - 1
                        error.add_note(
                            f"Round {before} is complete, in {self.output_dir}; rounds={before} ends there."
                        )
                    raise
            release(trainer)
        if self.clean is not None:
            clean = self.clean
            if isinstance(clean, str):
                clean = cross_fitting(self._policy, self.dpo_args, self.tokenizer)
            pairs = clean_pairs(pairs, clean, folder, self.dpo_args.seed)
        if pairs is not self.pairs:
            write_pairs(pairs, folder)
        seconds = time.monotonic() - started
        self.file.finish(StageResult(PAIRS, round_, str(folder), generated_tokens=tokens, seconds=seconds))

    def _sampler(self, folder: Path, beside: bool = False) -> GRPOTrainer:
        """
        The second stage's trainer with the current policy, and without the reward that DPO learns. `beside`: of a
        trainer that is at work.
        """
        args = self._args(self.policy_args, folder)
        rewards, args, kwargs = without_implicit_reward(self.reward_funcs, args, self.policy_kwargs)
        return self._second_trainer(args, rewards, kwargs, beside)

    def _measure_start(self, trainer: GRPOTrainer) -> None:
        assert self.held_out is not None
        texts: list[PromptTexts] = []
        measured = evaluate_policy(trainer, list(self.held_out), **self._measurement, texts=texts)
        if PartialState().is_main_process:
            write_texts(self._folder(START, 0) / HELD_OUT_TEXTS, 0, texts)
        self.file.finish(StageResult(START, 0, str(self._folder(START, 0)), measured=measured))
        means = (f"held-out {name} {e.mean:.3f} ({e.low:.3f} to {e.high:.3f})" for name, e in measured.items())
        print_once(", ".join(means))

    # DPO

    def _dpo(self, round_: int) -> None:
        started, folder = time.monotonic(), self._folder(DPO, round_)
        args, pairs = self._args(self.dpo_args, folder), read_pairs(self._folder(PAIRS, round_))
        pairs = self.pairs if pairs is None else pairs
        trainer = self._policy.trainer(
            lambda model: DPOTrainer(
                model=model,
                args=args,
                train_dataset=pairs,
                eval_dataset=self.eval_pairs,
                processing_class=self.tokenizer,
                **_own(self.dpo_kwargs),
            ),
            args.seed,
        )
        metric = PREFERENCE_ACCURACY if args.eval_strategy == "no" else f"{EVALUATION}{PREFERENCE_ACCURACY}"
        rule, held_out = self._end_of_dpo(trainer, folder, metric)
        self._train(trainer, DPO, folder, rule, held_out)
        state = trainer.state
        self._report_dpo(state, metric, has_threshold=isinstance(rule, StaysAbove))
        if isinstance(rule, StopsRising):
            print_once(f"its policy of step {rule.use_best(trainer, folder)} goes on, with the best held-out reward")
        for one in (trainer, *([held_out.sampler] if held_out is not None else [])):
            release(one)
        seconds = time.monotonic() - started
        self.file.finish(StageResult(DPO, round_, str(folder), state.global_step, seconds=seconds))

    def _end_of_dpo(
        self, trainer: Any, folder: Path, metric: str
    ) -> tuple[StaysAbove | StopsRising | None, HeldOut | None]:
        """Adds to DPO's trainer what ends it, and what measures for that."""
        rule: StaysAbove | StopsRising | None = None
        held_out: HeldOut | None = None
        if self.dpo_held_out_every:
            assert self.held_out is not None
            sampler = self._sampler(folder, beside=True)
            every = self.dpo_held_out_every
            held_out = HeldOut(trainer, list(self.held_out), every=every, sampler=sampler, **self._measurement)
            trainer.add_callback(held_out)
            weights = dict(zip(sampler.reward_func_names, sampler.reward_weights.tolist(), strict=True))
            rule = StopsRising(weights, self.dpo_patience, folder / "best")
        elif self.accuracy_threshold is not None:
            rule = StaysAbove(self.accuracy_threshold, self.accuracy_logs, metric)
        if rule is not None:
            trainer.add_callback(rule)
        return rule, held_out

    def _report_dpo(self, state: TrainerState, metric: str, has_threshold: bool) -> None:
        logged = [entry[metric] for entry in state.log_history if metric in entry]
        accuracy = f", preference accuracy {logged[-1]:.3f}" if logged else ""
        print_once(f"DPO ended at step {state.global_step} of {state.max_steps}{accuracy}")
        if has_threshold and len(logged) < self.accuracy_logs:
            print_once(
                f"accuracy_threshold asks for {self.accuracy_logs} logs of {metric}, and there were {len(logged)}: "
                "lower accuracy_logs, logging_steps or eval_steps if it is to end DPO."
            )

    # The second stage

    def _improve(self, round_: int) -> None:
        started, folder = time.monotonic(), self._folder(self.method, round_)
        args = self._args(self.policy_args, folder)
        rewards = [
            self._implicit_reward(round_) if reward == IMPLICIT_REWARD else reward for reward in self.reward_funcs
        ]
        trainer = self._second_trainer(args, rewards, self.policy_kwargs)
        if self.reference == BASE and REFERENCE_ADAPTER in trainer.model.peft_config:
            trainer.model.delete_adapter(REFERENCE_ADAPTER)
        critic, before = getattr(trainer, "critic", None), self._adapter_before(round_) / CRITIC
        if critic is not None and before.is_dir():
            critic.load(before)
        if self.fit_critic and whole_checkpoint(folder) is None:
            self._fit_critic(trainer, round_)
        held_out = None
        if self.held_out is not None:
            texts = folder / HELD_OUT_TEXTS
            held_out = HeldOut(
                trainer, list(self.held_out), every=self.held_out_every, texts=texts, **self._measurement
            )
            trainer.add_callback(held_out)
        self._train(trainer, self.method, folder, None, held_out)
        measured = read_estimates(trainer.state.log_history)
        result = StageResult(self.method, round_, str(folder), trainer.state.global_step)
        if measured:
            dpo = self.file.find(DPO, round_)
            assert dpo is not None
            dpo.measured = next(iter(measured.values()))
            result.measured = next(reversed(measured.values()))
        result.generated_tokens = trainer.counters.generated_tokens
        release(trainer)
        result.seconds = time.monotonic() - started
        self.file.finish(result)

    def _fit_critic(self, trainer: Any, round_: int) -> None:
        """A critic that has seen the rewards of the round's completions. A checkpoint of the stage holds it."""
        seed = self.policy_args.seed
        prompts = prompts_of_round(self.train_dataset, self.pair_settings, round_, seed)
        completions = scored_completions(trainer, prompts, self._folder(PAIRS, round_))
        if not completions:
            print_once("fit_critic: the pairs of this round were given, there are no completions to fit to")
            return
        fitted = fit_values(trainer, completions, self.fit_critic, seed)
        print_once(
            f"critic fitted to {fitted['completions']} completions in {fitted['steps']} steps, explained variance "
            f"{fitted['explained_variance']:.3f}"
        )

    def _implicit_reward(self, round_: int) -> ImplicitReward:
        """What DPO of this round has learned. It depends on saved adapters only, and so not on the process."""
        model: Any = self._policy.shared()
        model.add_adapter(REFERENCE_ADAPTER, model.peft_config[ADAPTER])
        load_adapter(model, self._adapter_before(round_), REFERENCE_ADAPTER)
        model.to(PartialState().device)
        template: Any = self.policy_args.chat_template_kwargs
        return ImplicitReward(
            model,
            None,
            self.dpo_args.beta,
            self.tokenizer,
            batch_size=self.policy_args.per_device_train_batch_size,
            reference_adapter=REFERENCE_ADAPTER,
            snapshot=True,
            chat_template_kwargs=template,
        )

    # Trainers

    def _second_trainer(
        self, args: Any, rewards: list[Any], kwargs: Mapping[str, Any], beside: bool = False
    ) -> GRPOTrainer:
        trainer: GRPOTrainer = self._policy.trainer(
            lambda model: self.policy_trainer(
                model=model,
                reward_funcs=rewards,
                args=args,
                train_dataset=self.train_dataset,
                processing_class=self.tokenizer,
                **_own(kwargs),
            ),
            args.seed,
            beside,
        )
        return trainer

    def _args(self, args: Any, folder: Path) -> Any:
        """A copy of a configuration for one stage. Stages are not pushed to the Hub."""
        own = copy.copy(args)
        own.output_dir, own.push_to_hub, own.resume_from_checkpoint = str(folder), False, None
        return own

    def _train(
        self,
        trainer: Any,
        name: str,
        folder: Path,
        rule: StaysAbove | StopsRising | None,
        held_out: HeldOut | None = None,
    ) -> None:
        if self.prepare is not None:
            self.prepare(name, trainer)

        def is_over(state: TrainerState) -> bool:
            return state.global_step >= state.max_steps or (rule is not None and rule.reached(state))

        train_stage(trainer, name, folder, is_over, held_out)

    # Folders and measurements

    def _folder(self, name: str, round_: int) -> Path:
        folder = self.output_dir / (START if name == START else f"round_{round_}/{name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def _latest_adapter(self) -> Path:
        trained = [stage.folder for stage in self.stages if stage.name in (DPO, self.method)]
        return Path(trained[-1]) if trained else self._folder(START, 0)

    def _adapter_before(self, round_: int) -> Path:
        return self._folder(self.method, round_ - 1) if round_ > 1 else self._folder(START, 0)

    def _copy_result(self) -> None:
        """Copies the last round's adapter, tokenizer and critic into the run's folder."""
        main, last = PartialState(), [stage.folder for stage in self.stages if stage.name == self.method][-1]
        if main.is_main_process:
            copy_model(Path(last), self.output_dir)
        main.wait_for_everyone()

    @property
    def _measurement(self) -> dict[str, Any]:
        samples = self.held_out_samples
        at_once, seed = self._prompts_at_once(samples), self.held_out_seed
        # Before a trainer's `train`, DeepSpeed hasn't taken over the weights that ZeRO-3 spreads: a pass can't gather
        kl = not is_deepspeed_zero3_enabled()
        return {"num_samples": samples, "batch_size": at_once, "seed": seed, "kl": kl}

    def _prompts_at_once(self, samples: int) -> int:
        """How many prompts, with so many samples each, make a generation batch of the second stage."""
        return max(1, int(self.policy_args.generation_batch_size or 1) // samples)


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's arguments with a curriculum of its own, because a curriculum learns during a training."""
    return {name: copy.deepcopy(value) if name == "curriculum" else value for name, value in arguments.items()}
