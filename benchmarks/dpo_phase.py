"""
What does a step of DPO cost: TRL's `DPOTrainer` against `trl_ext.DPOTrainer`?

Both train a random model on the same synthetic pairs, in turn (A B, then B A): prompts of 512 tokens (± 20 %), chosen
and rejected answers lognormal with median 40, cut at 128. Time is that of `train()` between its begin and its end,
passes of the reference included; gradients are compared in runs of their own, which are not timed.

```shell
python benchmarks/dpo_phase.py --json
python benchmarks/dpo_phase.py --pairs_per_prompt 2 --json   # two pairs of each prompt, in one optimizer step
python benchmarks/dpo_phase.py --device cuda --json   # a 0.5B-shaped model, prompts of 4,096 tokens
```
"""

import argparse
import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from task import build_tokenizer
from train_phase import SIZES, Watch, compared, device_name, seconds_in_turn, show
from transformers import Qwen2Config, Qwen2ForCausalLM

import trl_ext


PAIRS, MICRO_BATCH, ACCUMULATION = 32, 4, 8
SIDES = {
    "trl": (trl.DPOTrainer, trl.DPOConfig),
    "trl_ext": (trl_ext.DPOTrainer, trl_ext.DPOConfig),
}


def pairs(prompt: int, pairs_per_prompt: int) -> Dataset:
    """Texts of digits, one token each."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return "".join(map(str, torch.randint(10, (length,), generator=generator).tolist()))

    def answer() -> str:
        length = (torch.randn(1, generator=generator) * 0.6).exp().item() * 40 * prompt / 512
        return text(int(min(max(length, 1), prompt // 4)))

    spread = torch.rand(PAIRS // pairs_per_prompt, generator=generator) * 0.4 + 0.8
    prompts = [text(int(prompt * s)) for s in spread.tolist()]
    return Dataset.from_dict(
        {
            "prompt": [prompt for prompt in prompts for _ in range(pairs_per_prompt)],
            "chosen": [answer() for _ in range(PAIRS)],
            "rejected": [answer() for _ in range(PAIRS)],
        }
    )


def train(side: str, args: argparse.Namespace, detailed: bool) -> dict[str, Any]:
    trainer_class, config_class = SIDES[side]
    size, tokenizer = SIZES[args.device], build_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **size["config"],
            max_position_embeddings=4 * args.prompt,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    watch, cpu = Watch(args.device, gradients=detailed), args.device == "cpu"
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/policy")
        trainer = trainer_class(
            model=f"{directory}/policy",
            args=config_class(
                output_dir=directory,
                use_cpu=cpu,
                bf16=not (cpu or detailed),  # gradients are compared in float32
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                optim="sgd",
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                loss_type=[args.loss_type],
                max_length=None,
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=ACCUMULATION,
                max_steps=args.steps,
            ),
            train_dataset=pairs(args.prompt, args.pairs_per_prompt),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        slots = [0]

        def count(model: Any, positional: Any, inputs: dict[str, Any]) -> None:
            slots[0] += inputs["input_ids"].numel()

        for counted in (trainer.model, trainer.ref_model):
            counted.register_forward_pre_hook(count, with_kwargs=True)
        trainer.train()
    # The hooks see the inputs of a shared pass as they were before
    sharing = getattr(trainer, "sharing", None)
    return {
        "seconds": watch.seconds,
        "gradients": watch.gradients,
        "slots": slots[0] if sharing is None else sharing.token_slots,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt (default: 512; on a GPU 4096)")
    parser.add_argument("--pairs_per_prompt", type=int, choices=(1, 2, 4, 8), default=1)
    parser.add_argument("--loss_type", default="sigmoid")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of runs (default: 5)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a run (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the last line as JSON")
    args = parser.parse_args()
    args.prompt = args.prompt or SIZES[args.device]["longest"]
    torch.set_num_threads(1)

    detail = {side: train(side, args, detailed=True) for side in SIDES}  # not timed, and a warm-up for what is
    seconds = seconds_in_turn(list(SIDES), args.pairs, lambda side: train(side, args, detailed=False))
    result = {
        "prompt": args.prompt,
        "pairs_per_prompt": args.pairs_per_prompt,
        "loss_type": args.loss_type,
        "device": device_name(args.device),
        **compared("trl", detail, seconds),
        "padded_tokens_trl": detail["trl"]["slots"],
        "padded_tokens": detail["trl_ext"]["slots"],
    }
    show(result, args.json)


if __name__ == "__main__":
    main()
