"""
Tiny models, tokenizers, data and rewards for tests: built from a config and a seed, nothing is downloaded.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from trl_ext import GRPOTrainer
from trl_ext.rollouts.rollout import ScoredRound
from trl_ext.rollouts.selection import GroupSelection


WORDS = [f"w{i}" for i in range(20)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: pad 0, bos 1, eos 2, unk 3, then w0 … w19."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=(
            "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}w0{% endif %}"
        ),
    )


def qwen2(seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    """About 9k parameters, relative positions, no dropout."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.5,  # far from uniform, so that completions and entropies differ
        "torch_dtype": torch.float32,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **overrides}))


def stopping(seed: int = 0) -> Qwen2ForCausalLM:
    """[`qwen2`] that ends about half of its completions of 6 tokens, so that lengths differ."""
    model = qwen2(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 2.0
    return model


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Absolute positions, dropout off."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    return GPT2LMHeadModel(config)


def classifier(seed: int = 1, **overrides: Any) -> Qwen2ForSequenceClassification:
    """A reward or value model of [`qwen2`]'s shape: one number a sequence."""
    config = qwen2().config.to_dict() | {"num_labels": 1} | overrides
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(Qwen2Config(**config))


def reward_adapter(folder: Path, seed: int = 3, **overrides: Any) -> str:
    """
    A reward model as TRL's `RewardTrainer` saves one with PEFT, in `folder/reward`, on the base [`stopping`] that is
    saved in `folder/base`, both with the tokenizer. B and the head are random.
    """
    base = folder / "base"
    if not base.exists():
        stopping().save_pretrained(base)
        tokenizer().save_pretrained(base)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=overrides.pop("num_labels", 1))
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": 0.1}
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **{**settings, **overrides})).save_pretrained(
        folder / "reward"
    )
    tokenizer().save_pretrained(folder / "reward")
    return str(folder / "reward")


def lora(**overrides: Any) -> LoraConfig:
    """B is not zero, so that A has a gradient too."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}
    return LoraConfig(**{**settings, **overrides})


def nf4(nested: bool = True) -> BitsAndBytesConfig:
    """4 bits that compute in float32, with double quantisation or without."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=nested,
    )


def prompts(count: int = 32, conversational: bool = False) -> Dataset:
    """Distinct prompts of two words, each with a `target` word id from 4 to 23."""
    texts = [f"{WORDS[i % 20]} {WORDS[(i // 20) % 20]}" for i in range(count)]
    rows: list[Any] = [[{"role": "user", "content": text}] for text in texts] if conversational else list(texts)
    return Dataset.from_dict({"prompt": rows, "target": [4 + i % 20 for i in range(count)]})


def ragged(count: int = 32) -> Dataset:
    """Prompts of one to seven words."""
    texts = [" ".join(WORDS[(i * 7 + j * 3) % 20] for j in range(1 + i % 7)) for i in range(count)]
    return Dataset.from_dict({"prompt": texts, "target": [4 + i % 20 for i in range(count)]})


def cpu_settings(output_dir: Any, **overrides: Any) -> dict[str, Any]:
    """Arguments for a short run on a CPU: 4 prompts × 4 completions in two micro-batches, one optimizer step each."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "seed": 7,
    }
    return {**settings, **overrides}


def pair_settings(output_dir: Any, **overrides: Any) -> dict[str, Any]:
    """[`cpu_settings`] for trainers that take pairs and sample nothing."""
    sampling = ("num_generations", "max_completion_length")
    settings = {name: value for name, value in cpu_settings(output_dir).items() if name not in sampling}
    return {**settings, **overrides}


def low_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of tokens with an even id: groups of a random model nearly always differ in it."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def first_token_even(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 or 0: some groups of a random model have variance, some don't."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def constant(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Every group is dead."""
    return [0.0] * len(completion_ids)


def hashed(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A number in [0, 1) that differs between nearly all completions."""
    return [sum(token * 7**i for i, token in enumerate(ids)) % 101 / 101 for ids in completion_ids]


@dataclass
class LiveFor:
    """A reward with variance only for prompts whose `target` is among `targets`; all others get `otherwise`."""

    targets: set[int]
    otherwise: float = 0.0

    def __post_init__(self) -> None:
        self.__name__ = "live_for"

    def __call__(self, completion_ids: list[list[int]], target: list[int], **kwargs: Any) -> list[float]:
        rewards = hashed(completion_ids)
        return [r if t in self.targets else self.otherwise for r, t in zip(rewards, target, strict=True)]


@dataclass
class Call:
    """One call of a reward function."""

    step: int
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    rewards: list[Any]
    columns: dict[str, Any]


@dataclass
class Remembering:
    """A reward function that remembers all it was asked, and what it answered."""

    func: Callable[..., list[Any]]
    name: str = "remembering"
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.__name__ = self.name

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[Any]:
        rewards = self.func(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        step = columns["trainer_state"].global_step
        self.calls.append(Call(step, list(prompts), list(completions), list(completion_ids), list(rewards), columns))
        return rewards

    def at_step(self, step: int) -> list[Call]:
        """The calls for one generation batch, one a round, where every optimizer step generates one batch."""
        return [call for call in self.calls if call.step == step]


@dataclass
class TrainedBatch:
    """What `on_rollouts` saw: TRL's tensors of a generation batch, before they are shuffled."""

    output: dict[str, Any]
    selection: GroupSelection | None
    rounds: list[ScoredRound]

    @property
    def completions(self) -> list[list[int]]:
        """Completion ids without padding."""
        lengths = self.output["completion_mask"].sum(dim=1).tolist()
        return [row[:n] for row, n in zip(self.output["completion_ids"].tolist(), lengths, strict=True)]

    @property
    def prompts(self) -> list[list[int]]:
        """Prompt ids without padding, which stands on the left."""
        lengths = self.output["prompt_mask"].sum(dim=1).tolist()
        return [row[len(row) - n :] for row, n in zip(self.output["prompt_ids"].tolist(), lengths, strict=True)]


def recorded(trainer_class: type[GRPOTrainer]) -> Any:
    """`trainer_class` that keeps what it trained on."""

    class Recorded(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.batches: list[TrainedBatch] = []
            self.losses: list[dict[str, Any]] = []  # inputs of each loss, and its value
            self.forwards = 0  # of the model, outside of generation
            self._generating = False
            super().__init__(*args, **kwargs)
            self.model.register_forward_hook(self._count)

        def _count(self, *args: Any) -> None:
            self.forwards += not self._generating

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            self._generating = True
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                self._generating = False

        def on_rollouts(self, output: dict[str, Any], batch: Any) -> None:
            super().on_rollouts(output, batch)
            self.batches.append(TrainedBatch(dict(output), batch.selection, list(batch.rounds)))

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            if model.training:
                self.losses.append({**inputs, "loss": loss.item()})
            return loss

    Recorded.__name__ = trainer_class.__name__
    return Recorded


def trainer(
    trainer_class: type[GRPOTrainer],
    output_dir: str | Path,
    reward_funcs: Any = first_token_even,
    arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """
    A trainer on a tiny model: `arguments` go to the trainer, `settings` to its configuration. What a method's defaults
    make too large or too slow for a test (16 updates a batch, a warm-up of 20 steps, an overlong punishment that every
    completion of 6 tokens would get) is set back.
    """
    settled = {"updates_per_generation": 1, "soft_punish_cache": 0, "warmup_steps": 0, **settings}
    if "steps_per_generation" in settings:
        settled.pop("updates_per_generation")
    given = {
        "model": stopping(),
        "train_dataset": prompts(),
        "processing_class": tokenizer(),
        **(arguments or {}),
    }
    config = trainer_class.config_class(**cpu_settings(output_dir, **settled))
    return trainer_class(reward_funcs=reward_funcs, args=config, **given)


def trained(
    trainer_class: type[GRPOTrainer],
    output_dir: str | Path,
    reward_funcs: Any = first_token_even,
    arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A [`trainer`] that keeps what it trained on ([`recorded`]), after its training."""
    made = trainer(recorded(trainer_class), output_dir, reward_funcs, arguments, **settings)
    made.train()
    return made


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def history(trainer: Any, *leave_out: str) -> list[dict[str, Any]]:
    """What was logged in training, without what a clock decides."""
    clocks = {"step_time", *leave_out}
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key not in clocks} for entry in steps]


def leave() -> None:
    """
    Ends a process of several at once. Python's own end can abort one: a thread of gloo that lets go of a tensor when
    the interpreter is gone ends the process with SIGABRT, and DeepSpeed's references keep those threads alive after
    the group is destroyed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
