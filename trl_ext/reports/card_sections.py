"""
What a model card says of a run beside its results: completions of before and after, health checks in words, how the
parts of the model are loaded, settings, and limits. All of it is read from the run's folder.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..evaluation.held_out_texts import Change, changes
from ..roles.saved import ADAPTER, CRITIC_ROLE, POLICY, REWARD, form_of, roles_of
from .health_words import measured
from .plots import shorten
from .run_files import PLACES, Run


MOST_BETTER, MOST_WORSE = 3, 2  # completions that are shown
LONGEST_TEXT = 1_500  # characters of a prompt or a completion
# Settings that a reader asks for first, whether they were chosen or are defaults
ALWAYS_SHOWN = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations"),
    *("max_completion_length", "temperature", "loss_type", "beta", "epsilon", "epsilon_high", "kl_coef", "gamma"),
    *("lam", "cliprange", "vf_coef", "use_peft", "lora_r", "lora_alpha", "bf16", "seed"),
)
_LORA = re.compile("lora_")

_WITH_CRITIC = """
from peft import {policy}
from transformers import AutoTokenizer

from trl_ext import load_critic
from trl_ext.roles.critic import logps_and_values

policy, tokenizer = {policy}.from_pretrained({name}), AutoTokenizer.from_pretrained({name})
critic = load_critic({name}, policy)  # which attaches it to the policy
inputs = tokenizer({example}, return_tensors="pt")
logps, values = logps_and_values(policy, inputs["input_ids"], inputs["attention_mask"])
print(values)  # of the state after each token
"""


def details(run: Run, name: str, example: str = "The capital of France is") -> str:
    """
    Markdown for a model card, after the results.

    Args:
        run ([`Run`]):
            The finished run.
        name (`str`):
            How its model is loaded: its Hub id or its folder.
        example (`str`, *optional*):
            A text on which its parts can be tried.

    Returns:
        `str`: sections with headings of level 2.
    """
    parts = (_completions(run), _health(run), _loading(run, name, example), _settings(run), _limits(run))
    return "\n\n".join(part for part in parts if part) + "\n"


def _completions(run: Run) -> str:
    metric = run.metric
    found = changes(run.before, run.after, metric) if metric is not None else []
    if not found:
        return ""
    better, worse = [c for c in found if c.gain > 0], [c for c in found if c.gain < 0]
    shown = [*better[:MOST_BETTER], *worse[::-1][:MOST_WORSE]]
    lines = [
        "## Completions",
        f"Of {len(found)} held-out prompts, the mean {metric} rose on {len(better)}, fell on {len(worse)} and stayed "
        f"on {len(found) - len(better) - len(worse)}. Those that changed most, up and down; of each policy, the "
        f"completion whose {metric} is nearest to the mean of its prompt:",
        *(_change(change, str(metric)) for change in shown),
    ]
    return "\n\n".join(lines)


def _change(change: Change, metric: str) -> str:
    direction = "better" if change.gain > 0 else "worse"
    return "\n\n".join(
        (
            f"**{direction}: {metric} {change.reward_before:.3g} → {change.reward_after:.3g}**",
            *(
                f"{title}\n{fenced(shorten(text, LONGEST_TEXT))}"
                for title, text in (("Prompt", change.prompt), ("Before", change.before), ("After", change.after))
            ),
        )
    )


def fenced(text: str) -> str:
    """A block of code that no text ends early."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _health(run: Run) -> str:
    rows = []
    for finding in measured(run):
        place = f" ({finding.stage})" if finding.stage else ""
        rows.append(f"| {finding.check.replace('_', ' ')}{place} | {finding.words.replace('|', '/')} |")
    return "\n".join(("## Health checks\n", "| check | found |", "|---|---|", *rows)) if rows else ""


def _loading(run: Run, name: str, example: str) -> str:
    form, roles = form_of(run.folder), roles_of(run.folder)
    written, parts = json.dumps(name), []
    policy = "AutoPeftModelForCausalLM" if form == ADAPTER else "AutoModelForCausalLM"
    if CRITIC_ROLE in roles:
        code = _WITH_CRITIC.format(policy=policy, name=written, example=json.dumps(example))
        code = code if form == ADAPTER else code.replace("from peft", "from transformers")
        parts.append(f"Log-probabilities, and the critic's values from the same forward pass:\n\n```python{code}```")
    if form == ADAPTER and POLICY in roles:
        parts.append(
            f"It is an adapter. `AutoPeftModelForCausalLM.from_pretrained({written}).merge_and_unload()` gives plain "
            "weights, as does `trl-ext export RUN --merge` from the run's folder."
        )
    if REWARD in roles:
        parts.append(
            f"It is a reward model: `--reward_model_name_or_path {name}` gives it to the recipes that sample. "
            "On a policy that has an adapter on the same base, an adapter is one more (`trl_ext.AdapterReward`)."
        )
    return "\n\n".join(("## How to load its parts", *parts)) if parts else ""


def _settings(run: Run) -> str:
    lora = run.settings.get("use_peft")
    rows = []
    for name in dict.fromkeys((*ALWAYS_SHOWN, *run.chosen)):
        if name not in run.settings or name in PLACES:
            continue
        value = run.settings[name]
        if value is None or (_LORA.match(name) and not lora):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        mark = "" if name in run.chosen else " (default)"
        rows.append(f"| `{name}` | {shorten(text, 200).replace('|', '/')}{mark} |")
    return "\n".join(("## Settings\n", "| | |", "|---|---|", *rows)) if rows else ""


def _limits(run: Run) -> str:
    summary: Mapping[str, Any] = run.summary
    last: Mapping[str, Any] = summary.get("after") or next(iter(summary.get("stages", [])[-1:]), {})
    lines = []
    if last.get("intervals"):
        metrics = " and ".join(last["intervals"])
        lines.append(
            f"What was measured is {metrics}, on {last['prompts']} prompts of one data set, as in training. Nothing "
            "else was: no other task, no safety, no other language."
        )
        lines.append(
            "The intervals cover which prompts and samples were drawn, not another seed: this is one run. Runs that "
            "differ in the seed alone can differ by more."
        )
    else:
        lines.append("The model was not measured on held-out data.")
    lines.append("It has learned what raises its training objective, which is not being right, or harmless.")
    return "\n".join(("## Limits\n", *(f"- {line}" for line in lines)))
