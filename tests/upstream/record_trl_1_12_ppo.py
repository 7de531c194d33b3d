"""
What TRL 1.12's `PPOTrainer`, the last one that TRL had, computes in one step on tiny models.

    python tests/upstream/record_trl_1_12_ppo.py

installs TRL 1.12 into an environment of its own (that of `benchmarks/ppo.py`), trains there, and writes
`trl_1_12_ppo.safetensors` and `trl_1_12_ppo.json`: the weights of policy, reference, reward and value model, and for
each case the prompts and completions, what was made of them (log-probabilities, scores, KL, values, token rewards,
advantages, returns), both losses of both epochs, the weights after them, and what was logged. `test_trl_1_12_ppo.py`
gives weights and completions to ours.

Prompts differ in length and completions don't: where completions have equal lengths and nothing in them is taken for
padding, the algorithm is the same, and so is everything measured here. Two epochs, because a ratio is 1 in the first;
plain gradient descent, because Adam hides a wrong constant and makes much of rounding.

What 1.12 does otherwise in other cases, so that its numbers aren't ours there (its source is
`trl/experimental/ppo/ppo_trainer.py`):

- The score of a completion that ends early is put on the first token of padding (`sequence_lengths + 1`), not on the
  token that ends it. The state there has a value, which is trained, but no action: credit takes one more step.
- Padding is told by its id. With one token for padding and end, the action that ends a completion is left out of the
  loss; a padding token that the policy samples ends the completion for rewards and losses, not for generation.
- Whitening of advantages and rewards is of each process by itself.
- Losses are means over the tokens of a micro-batch: under gradient accumulation, a token's weight depends on what it
  shares a micro-batch with.
- `num_mini_batches` makes no optimizer steps under gradient accumulation: `accumulate` counts micro-batches, and steps
  after `gradient_accumulation_steps` of them, whichever mini-batch they are of.
- `max_grad_norm` and `max_steps` have no effect. The learning rate changes once a batch, not once an optimizer step.
- `missing_eos_penalty` looks for the tokenizer's end-of-sequence token, even where `stop_token_id` ends completions.
- `policy/approxkl_avg`, `policy/entropy_avg` and `val/ratio` are means over padding, too; `val/num_eos_tokens` counts
  what was generated after the end, where nothing stops it.
- `temperature` is 1e-7 more than asked for, in generation and in log-probabilities.
- A run can't be resumed, the value model is never saved, ZeRO-3 saves nothing, `gradient_checkpointing` is never
  switched on, and a data set smaller than a batch hangs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)


ROOT = Path(__file__).resolve().parents[2]
TENSORS, REST = (Path(__file__).with_name(f"trl_1_12_ppo.{suffix}") for suffix in ("safetensors", "json"))

PAD, EOS, VOCABULARY, ROWS, COMPLETION, EPOCHS = 0, 1, 96, 8, 6, 2
ROLES = {
    "policy": Qwen2ForCausalLM,
    "reference": Qwen2ForCausalLM,
    "reward": Qwen2ForSequenceClassification,
    "value": Qwen2ForSequenceClassification,
}
# Settings that both trainers know by these names
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "total_episodes": ROWS,
    "num_ppo_epochs": EPOCHS,
    "num_mini_batches": 1,
    "response_length": COMPLETION,
    "temperature": 0.7,
    "vf_coef": 0.5,
    "cliprange": 0.1,
    "cliprange_value": 0.1,
    "optim": "sgd",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,  # 1.12 never clips
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "k1": {"kl_estimator": "k1", "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95},
    "k3": {
        "kl_estimator": "k3",
        "kl_coef": 0.2,
        "gamma": 0.9,
        "lam": 0.8,
        "whiten_rewards": True,
        "missing_eos_penalty": 0.5,
    },
}
# Variables of 1.12's training loop. Of the batch, with advantages before and after whitening:
OF_BATCH = ("queries", "responses", "logprobs", "ref_logprobs", "scores", "kl", "values", "rewards", "returns")
# Of an epoch:
OF_EPOCH = ("new_logprobs", "vpred", "pg_loss", "vf_loss")


@dataclass
class Recorded:
    """What the two files hold."""

    weights: dict[str, dict[str, torch.Tensor]]
    cases: dict[str, dict[str, torch.Tensor]]
    rest: dict[str, Any]


def recorded() -> Recorded:
    """Read the files."""
    weights: dict[str, dict[str, torch.Tensor]] = {role: {} for role in ROLES}
    cases: dict[str, dict[str, torch.Tensor]] = {case: {} for case in CASES}
    for name, tensor in load_file(TENSORS).items():
        owner, _, own_name = name.partition("/")
        (weights if owner in weights else cases)[owner][own_name] = tensor
    return Recorded(weights, cases, json.loads(REST.read_text(encoding="utf-8")))


def built(role: str) -> Any:
    """A model that is far from uniform, and has no biases that are all zero. The reference is near the policy."""
    torch.manual_seed({"reward": 1, "value": 2}.get(role, 0))
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        initializer_range=0.4,
        num_labels=1,
    )
    model = ROLES[role](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
        if role == "reference":
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def restored(role: str, weights: dict[str, torch.Tensor]) -> Any:
    """A model with recorded weights."""
    model = built(role)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # tied to the embeddings
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """What [`restored`] needs."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2")),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )


def prompts() -> list[list[int]]:
    """Token ids of 2 to 5 tokens, no two prompts alike."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCABULARY, (2 + row % 4,), generator=generator).tolist() for row in range(ROWS)]


# In the environment of TRL 1.12


def train(case: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One batch of 1.12's trainer: tensors, and what it logged."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    found: dict[str, torch.Tensor] = {}
    epochs: list[dict[str, torch.Tensor]] = []
    whiten, of_loop = ppo_trainer.masked_whiten, PPOTrainer.train.__code__

    def variables(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Of the training loop, two calls from here."""
        frame = sys._getframe(2)
        assert frame.f_code is of_loop
        return {name: frame.f_locals[name].detach().clone() for name in names}

    def whitening(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        whitened: torch.Tensor = whiten(values, mask, shift_mean)
        if shift_mean:  # advantages, the last thing that is computed of a batch
            found.update(variables(OF_BATCH), raw_advantages=values.clone(), advantages=whitened.clone())
            assert mask.all(), "padding or an end was sampled: choose another seed"
        return whitened

    models_ = {role: built(role) for role in ROLES}
    ppo_trainer.masked_whiten = whitening
    try:
        with tempfile.TemporaryDirectory() as directory:
            trainer = PPOTrainer(
                args=PPOConfig(output_dir=directory, **SETTINGS, **CASES[case], num_sample_generations=0),
                processing_class=tokenizer(),
                model=models_["policy"],
                ref_model=models_["reference"],
                reward_model=models_["reward"],
                value_model=models_["value"],
                train_dataset=Dataset.from_dict({"input_ids": prompts()}),
            )
            backward = trainer.accelerator.backward

            def backward_of_epoch(loss: torch.Tensor) -> None:
                # Rows are shuffled anew in each epoch
                order = torch.from_numpy(sys._getframe(1).f_locals["micro_batch_inds"]).argsort()
                of_epoch = variables(OF_EPOCH)
                epochs.append({name: value[order] if value.dim() else value for name, value in of_epoch.items()})
                backward(loss)

            trainer.accelerator.backward = backward_of_epoch
            trainer.train()
    finally:
        ppo_trainer.masked_whiten = whiten
    assert not ((found["responses"] == PAD) | (found["responses"] == EOS)).any(), "an end was sampled: another seed"
    for name in OF_EPOCH:
        found[name] = torch.stack([epoch[name] for epoch in epochs])
    for role in ("policy", "value"):
        found |= {f"{role}_after/{name}": tensor for name, tensor in weights_of(models_[role]).items()}
    logged = {name: value for name, value in trainer.state.log_history[0].items() if name not in ("eps", "step")}
    return found, logged


def record() -> None:
    """Train every case, and write the files."""
    import transformers
    import trl

    tensors = {f"{role}/{name}": tensor for role in ROLES for name, tensor in weights_of(built(role)).items()}
    logged = {}
    for case in CASES:
        found, logged[case] = train(case)
        tensors |= {f"{case}/{name}": tensor for name, tensor in found.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, TENSORS)
    versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    rest = {"versions": {"trl": trl.__version__, **versions}, "logged": logged}
    REST.write_text(json.dumps(rest, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="this environment is the one with TRL 1.12")
    if parser.parse_args().here:
        torch.set_num_threads(1)
        record()
        return
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from ppo import environment_of, python_with_trl_1_12

    subprocess.run([python_with_trl_1_12(), __file__, "--here"], check=True, env=environment_of("theirs"))
    size = sum(os.path.getsize(path) for path in (TENSORS, REST))
    print(f"wrote {TENSORS.name} and {REST.name}, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
