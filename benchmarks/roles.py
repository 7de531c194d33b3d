"""
What do the four models of PPO cost, as four models and as adapters on one? Actor, critic, reward model and reference,
each with weights of its own (`separate`) or all on one frozen base (`trunk`).

Equal on both sides: the shape of the models (100M parameters, Llama's architecture, random weights, float32), prompts,
settings, and what the actor trains, a LoRA of rank 16 on every linear layer. The reward model was trained as such an
adapter on the same base: `trunk` loads it as one, `separate` as the model that merging makes of it. Not equal is what
the critic trains, because one is what people use in place of the other: such a LoRA and a head, or a whole model.

The sides are alive at the same time and take turns after every step, as in `ppo.py`. Time is that of a whole step
(generation, scoring, two updates in micro-batches of 4), after one step of warm-up; ratios are medians over pairs of
steps. `weights` are the bytes of all weights in the process, each storage once, in the last step; `peak` is that of
the resident set, beyond what it was after the imports.

```shell
python benchmarks/roles.py --json
```
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from turns import Clock, Memory, quiet_environment, take_turns, wait_for_turn
from words import word_tokenizer


# Nothing heavy is imported here: what a side imports is its own, and is measured

SIDES = ("separate", "trunk")
PROMPTS, PROMPT, COMPLETION, MICRO_BATCH, EPOCHS = 8, 24, 24, 4, 2
VOCABULARY = 32_000
FULL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
TINY = {**FULL, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPES = {"full": FULL, "tiny": {**TINY, "num_key_value_heads": 2}}


def lora(task_type: str) -> Any:
    from peft import LoraConfig

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=32, target_modules=modules, lora_dropout=0.0, task_type=task_type)


def write_models(folder: Path, shape: dict[str, Any]) -> None:
    """The base, a reward adapter on it, and the same reward model merged."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "base")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    model = get_peft_model(model, lora("SEQ_CLS"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.save_pretrained(folder / "reward_adapter")
    model.merge_and_unload().save_pretrained(folder / "reward_model")
    for name in ("base", "reward_adapter", "reward_model"):
        word_tokenizer(VOCABULARY).save_pretrained(folder / name)


def loaded(folder: Path, classifier: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classifier:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def roles_of(side: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the trainer, and settings."""
    from trl_ext import AdapterReward

    policy = {"model": loaded(folder / "base"), "peft_config": lora("CAUSAL_LM")}
    if side == "trunk":
        return {**policy, "reward_funcs": AdapterReward(folder / "reward_adapter")}, {"critic": "adapter"}
    models = {
        "ref_model": loaded(folder / "base"),
        "reward_model": loaded(folder / "reward_model", classifier=True),
    }
    return {**policy, **models}, {"critic": "model"}


def train(side: str, folder: Path, steps: int, clock: Clock) -> dict[str, float]:
    """
    Trains for one step of warm-up and `steps` more. Returns the bytes of all weights, and of those that learn, and
    the tokens and the mean reward of the first step.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from trl_ext import PPOConfig, PPOTrainer
    from trl_ext.roles.trunk import storages

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8 * PROMPTS, PROMPT), generator=generator).tolist()
    arguments, settings = roles_of(side, folder)
    found: dict[str, float] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % EPOCHS == 0:
                funcs = trainer.reward_funcs if isinstance(trainer.reward_funcs, list) else [trainer.reward_funcs]
                models = [m for m in (trainer.model, trainer.ref_model, *funcs) if isinstance(m, torch.nn.Module)]
                weights = [weight for model in models for weight in model.parameters()]
                found["weights"] = sum(storages(weights).values())
                found["trained"] = sum(storages(weight for weight in weights if weight.requires_grad).values())
                clock.end_step()

    with tempfile.TemporaryDirectory() as directory:
        config = PPOConfig(
            directory,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=PROMPTS // MICRO_BATCH,
            num_iterations=EPOCHS,
            max_steps=EPOCHS * (1 + steps),
            max_completion_length=COMPLETION,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=EPOCHS,
            seed=0,
            **settings,
        )
        rows = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids]})
        trainer = PPOTrainer(
            args=config,
            train_dataset=rows,
            processing_class=word_tokenizer(VOCABULARY),
            callbacks=[Watch()],
            **arguments,
        )
        clock.follow(trainer)
        trainer.train()
    first = trainer.state.log_history[0]
    return {**found, "tokens": first["num_tokens"], "reward": first["objective/scores"]}


def run_side(side: str, folder: Path, steps: int) -> None:
    """One side in this process. Says on stdout when it waits for a line, and in the end what it measured."""
    import torch

    torch.set_num_threads(1)
    clock = Clock(wait_for_turn)
    with redirect_stdout(sys.stderr):  # what trainers print
        train(side, folder / "tiny", 0, Clock(lambda: None))  # for what is imported late
        memory = Memory()
        found = train(side, folder / "measured", steps, clock)
    print(json.dumps({"steps": clock.steps, "peak": memory.peak, **found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run, after one of warm-up (default: 2)")
    parser.add_argument("--shape", choices=SHAPES, default="full", help="of the models (default: full)")
    parser.add_argument("--side", choices=SIDES, help="train this side in this process, a step for each line of input")
    parser.add_argument("--models", type=Path, help="folder of the models, with --side")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    if args.side is not None:
        run_side(args.side, args.models, args.steps)
        return

    script = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        write_models(Path(directory) / "tiny", SHAPES["tiny"])
        write_models(Path(directory) / "measured", SHAPES[args.shape])
        commands = {
            side: [sys.executable, script, "--side", side, "--models", directory, "--steps", str(args.steps)]
            for side in SIDES
        }
        environments = dict.fromkeys(SIDES, quiet_environment())
        rounds = [take_turns(commands, environments, args.steps) for _ in range(args.rounds)]

    def values(side: str, name: str) -> list[float]:
        """Of every step, or of every run."""
        if name in ("weights", "trained", "peak"):
            return [runs[side][name] for runs in rounds]
        return [step[name] for runs in rounds for step in runs[side]["steps"]]

    columns = ("seconds", "generation", "training", "cpu_seconds", "weights", "trained", "peak")
    scale = {"weights": 2**-20, "trained": 2**-20}
    print(f"{'':>9}" + "".join(f"{name:>13}" for name in columns))
    for side in SIDES:
        print(
            f"{side:>9}"
            + "".join(f"{scale.get(name, 1) * statistics.median(values(side, name)):>13.3f}" for name in columns)
        )
    print("seconds a step; weights, trained weights and peak in MB")
    tokens = {side: {runs[side]["tokens"] for runs in rounds} for side in SIDES}
    rewards = {side: [runs[side]["reward"] for runs in rounds] for side in SIDES}
    if tokens["separate"] != tokens["trunk"] or not all(map(all, rewards.values())):
        raise RuntimeError(f"The sides do different work: {tokens} tokens, rewards {rewards}.")

    def ratio(name: str) -> float:
        pairs = zip(values("trunk", name), values("separate", name), strict=True)
        return statistics.median(one / other for one, other in pairs)

    names = {"weights_memory_ratio": "weights", "peak_memory_ratio": "peak", "time_ratio": "seconds"}
    result = {key: round(ratio(name), 4) for key, name in names.items()}
    print(json.dumps(result) if args.json else result)


if __name__ == "__main__":
    main()
