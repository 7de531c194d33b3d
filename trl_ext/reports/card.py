"""
What a run adds to the model card that TRL writes: the result with its interval, the figure, what it took, and the
command and configuration that repeat it.
"""

import json
from typing import Any

from ..evaluation.pairs import PAIR_ACCURACY
from ..monitors.progress import count
from .summary import redact


def results_section(
    summary: dict[str, Any],
    figure: str | None = None,
    config: str | None = None,
    example_prompt: str | None = None,
    token_figure: str | None = None,
) -> str:
    """
    Markdown for a model card.

    Args:
        summary (`dict[str, Any]`):
            What [`summarize`] returned.
        figure (`str`, *optional*):
            Path of the figure relative to the card.
        config (`str`, *optional*):
            Text of the yaml file the run was launched with. Access tokens in it, and in the command line, are replaced
            by `***`.
        example_prompt (`str`, *optional*):
            A plain-text prompt to show how the model is asked. Models with a chat template need none: TRL's own card
            shows that.
        token_figure (`str`, *optional*):
            Path of the figure of single completions, token by token.

    Returns:
        `str`: a section that begins with a heading of level 2.
    """
    parts = ["## Results", _headline(summary)]
    if figure is not None:
        shown = "reward, critic, KL" if summary["critic"] else "reward, groups, tokens"
        parts.append(f"![{summary['method']}: {shown} and held-out results]({figure})")
    if token_figure is not None:
        parts.append(f"![two completions, token by token: value, advantage, probability]({token_figure})")
    parts.append(_costs(summary))
    if example_prompt is not None:
        parts += ["### Ask it", _usage(example_prompt)]
    if summary["command"]:
        parts += ["### Train it again", f"```shell\n{summary['command']}\n```"]
        if config:
            parts.append(f"with this configuration:\n\n```yaml\n{redact(config.strip())}\n```")
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    parts.append(f"Made with {versions}.")
    return "\n\n".join(parts) + "\n"


def _headline(summary: dict[str, Any]) -> str:
    before, after, gain = summary["before"], summary["after"], summary["gain"]
    if after is None:
        return "This run was made without held-out evaluation."
    lines = [
        f"Held-out prompts ({after['prompts']}, {after['samples']} sampled completions), before and after "
        f"{summary['steps']} optimizer steps, with 95 % intervals that take the prompt as the unit:",
        "",
        "| metric | before | after | gain |",
        "|---|---|---|---|",
    ]
    for name in after["intervals"]:
        cells = [_cell(part, name) for part in (before, after, gain)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(part: dict[str, Any], name: str) -> str:
    if name not in part:
        return "–"
    low, high = part["intervals"][name]
    return f"{part[name]:.3f} ({low:.3f} to {high:.3f})"


def _costs(summary: dict[str, Any]) -> str:
    rows = {
        "method": summary["method"],
        "trained from": f"`{summary['model']}`" if summary["model"] else None,
        "data": f"`{summary['dataset']}`" if summary["dataset"] else None,
        **_reward_model(summary["reward_model"] or {}),
        "parameters": f"{summary['trainable_parameters']:,} trained of {summary['parameters']:,}",
        "optimizer steps": summary["steps"],
        "generation rounds": summary["generation_rounds"],
        "tokens generated": None if summary["generated_tokens"] is None else count(summary["generated_tokens"]),
        "tokens trained on": None if summary["trained_tokens"] is None else count(summary["trained_tokens"]),
        "padding and dead rows not computed": None
        if summary["compute_saved"] is None
        else f"{summary['compute_saved']:.0%}",
        **_critic(summary["critic"] or {}),
        "wall-clock seconds": summary["seconds"],
        "machine": f"{summary['machine']['processes']} × {summary['machine']['device']}",
        "seed": summary["seed"],
    }
    shown = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *shown])


def _reward_model(reward_model: dict[str, Any]) -> dict[str, str]:
    rows = {}
    if reward_model:
        rows["reward model"] = f"`{reward_model['model']}`"
    if PAIR_ACCURACY in reward_model:
        pairs = reward_model["prompts"]
        rows[f"of {pairs} held-out pairs, it ranks right"] = _cell(reward_model, PAIR_ACCURACY)
    before = reward_model.get("before") or {}
    if PAIR_ACCURACY in before:
        rows["… and did before its training"] = _cell(before, PAIR_ACCURACY)
    return rows


def _critic(critic: dict[str, float]) -> dict[str, str]:
    """What the last tenth of the run says of critic and policy."""
    rows = {}
    if "explained_variance" in critic:
        rows["explained variance of the critic, at the end"] = f"{critic['explained_variance']:.2f}"
    if "kl" in critic:
        rows["KL to the reference, at the end"] = f"{critic['kl']:.2f} nats per completion"
    return rows


def _usage(prompt: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        f'inputs = tokenizer({json.dumps(prompt)}, return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))\n"
        "```"
    )
