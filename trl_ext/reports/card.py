"""
What a run adds to the model card that TRL writes: the results with their intervals, the figure, what the run cost, and
the command and configuration that repeat it.
"""

from pathlib import Path
from typing import Any

from trl.trainer.utils import generate_model_card

from ..evaluation.pairs import PAIR_ACCURACY
from ..monitors.progress import count
from ..redaction import redact
from ..trainers.cards import CARD, CardFacts, as_written, base_of, completed
from .summary import held_out_cell, intervals_in_words, machine_in_words


def results_section(
    summary: dict[str, Any],
    figure: str | None = None,
    config: str | None = None,
    token_figure: str | None = None,
    reliability_figure: str | None = None,
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
        token_figure (`str`, *optional*):
            Path of the figure of single completions, token by token.
        reliability_figure (`str`, *optional*):
            Path of the figure of predicted probabilities against what came true.

    Returns:
        `str`: a section that begins with a heading of level 2.
    """
    parts = ["## Results", _headline(summary)]
    if figure is not None:
        shown = "reward, critic, KL" if summary["critic"] else "reward, groups, tokens"
        parts.append(f"![{summary['method']}: {shown} and held-out results]({figure})")
    if token_figure is not None:
        parts.append(f"![two completions, token by token: value, advantage, probability]({token_figure})")
    if reliability_figure is not None:
        parts.append(f"![how often predictions of groups came true]({reliability_figure})")
    parts.append(_costs(summary))
    return "\n\n".join([*parts, *_expected(summary), *_repeat(summary, config)]) + "\n"


def stages_section(summary: dict[str, Any], figure: str | None = None, config: str | None = None) -> str:
    """
    Markdown for the model card of a run of several stages.

    Args:
        summary (`dict[str, Any]`):
            What [`~trl_ext.reports.summary.summarize_stages`] returned.
        figure, config (`str`, *optional*):
            As in [`results_section`].

    Returns:
        `str`: a section that begins with a heading of level 2.
    """
    parts = ["## Results"]
    stages = summary["stages"]
    if stages:
        names = list(stages[-1]["intervals"])
        parts.append(
            f"Held-out prompts ({stages[-1]['prompts']}, {stages[-1]['samples']} sampled completions) after each "
            "stage, with 95 % intervals that take the prompt as the unit:"
        )
        header = [*names, "optimizer steps", "tokens generated", "seconds"]
        rows = [f"| stage | {' | '.join(header)} |", "|---|" + "---|" * len(header)]
        for stage in stages:
            cells = [held_out_cell(stage, name) for name in names]
            cells += [str(stage["steps"]), count(stage["generated_tokens"]), f"{stage['seconds']:.0f}"]
            rows.append(f"| {stage['name']} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    if figure is not None:
        parts.append(
            f"![{summary['method']}: held-out results, preference accuracy and KL by optimizer step]({figure})"
        )
    return "\n\n".join([*parts, *_expected(summary), *_repeat(summary, config)]) + "\n"


def write_stages_card(
    folder: str | Path,
    section: str,
    summary: dict[str, Any],
    base_model: str,
    dataset: str | None,
    hub_id: str | None = None,
    *,
    tokenizer: Any,
    example: str,
) -> None:
    """
    Writes `README.md`: TRL's model card, then `section`.

    Args:
        folder (`str` or `Path`):
            The model's folder.
        section (`str`):
            What [`stages_section`] returned.
        summary (`dict[str, Any]`):
            The summary from which the section was made.
        base_model (`str`):
            Hub id, or a folder. The card doesn't link a folder.
        dataset (`str`, *optional*):
            Hub id of the data.
        hub_id (`str`, *optional*):
            Hub id under which the model is published. `None`: it isn't published.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        example (`str`):
            A prompt, for a model without a chat template.
    """
    name = Path(folder).name if hub_id is None else hub_id.split("/")[-1]
    methods = list(dict.fromkeys(stage["name"].split()[0] for stage in summary["stages"][1:]))
    linked = base_of(base_model) if Path(base_model).exists() else base_model
    card: Any = generate_model_card(
        linked,
        name,
        str(hub_id),
        dataset,
        tags=["trl", "trl_ext", *methods],
        wandb_url=None,
        trackio_url=None,
        trainer_name=summary["method"],
        trainer_citation="",
        paper_title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        paper_id="2305.18290",
    )
    last = summary["stages"][-1] if summary["stages"] else {}
    facts = CardFacts(
        hub_id or as_written(Path(folder)),
        adapter=True,
        chat=getattr(tokenizer, "chat_template", None) is not None,
        example=example,
        base_model=linked,
        metrics={metric: last[metric] for metric in last.get("intervals", ())},
        intervals=intervals_in_words(last),
    )
    text = completed(str(card), facts)
    (Path(folder) / CARD).write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")


def _expected(summary: dict[str, Any]) -> list[str]:
    """The numbers that the configuration expects, and what became of them."""
    if not summary.get("expected"):
        return []
    rows = ["| expected | at step | from | to | found |", "|---|---|---|---|---|"]
    for band in summary["expected"]:
        if not band["reached"]:
            found = "the run ended before"
        elif band["at"] is None:
            found = "not logged"
        else:
            value = "no number" if band["value"] is None else f"{band['value']:.4g}"
            found = value if band["holds"] else f"{value}, outside"
        rows.append(f"| {band['metric']} | {band['step']} | {band['low']:g} | {band['high']:g} | {found} |")
    return ["\n".join(rows)]


def _repeat(summary: dict[str, Any], config: str | None) -> list[str]:
    """How to repeat the run, and with which versions it was made."""
    parts = []
    if summary["command"]:
        parts += ["### Train it again", f"```shell\n{summary['command']}\n```"]
        if config:
            parts.append(f"with this configuration:\n\n```yaml\n{redact(config.strip())}\n```")
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return [*parts, f"Made on {machine_in_words(summary['machine'])} with {versions}."]


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
        cells = [held_out_cell(part, name) for part in (before, after, gain)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
        "padding and dead rows not computed": f"{summary['compute_saved']:.0%}"
        if (summary["compute_saved"] or 0) >= 0.01  # where there was something to save
        else None,
        **_critic(summary["critic"] or {}),
        **_prediction(summary["prediction"] or {}),
        "wall-clock seconds": summary["seconds"],
        "machine": machine_in_words(summary["machine"]),
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
        rows[f"of {pairs} held-out pairs, it ranks right"] = held_out_cell(reward_model, PAIR_ACCURACY)
    before = reward_model.get("before") or {}
    if PAIR_ACCURACY in before:
        rows[f"of {before['prompts']} held-out pairs, it ranked right before its training"] = held_out_cell(
            before, PAIR_ACCURACY
        )
    return rows


def _critic(critic: dict[str, float]) -> dict[str, str]:
    """Critic and policy in the last tenth of the run."""
    rows = {}
    if "explained_variance" in critic:
        rows["explained variance of the critic, at the end"] = f"{critic['explained_variance']:.2f}"
    if "kl" in critic:
        rows["KL to the reference, at the end"] = f"{critic['kl']:.2f} nats per completion"
    return rows


def _prediction(prediction: dict[str, float]) -> dict[str, str]:
    """Of the prediction by which prompts were chosen."""
    if not prediction:
        return {}
    rows = {"calibration error of the prediction of groups, at the end": f"{prediction['calibration_error']:.2f}"}
    if prediction["tokens"]:
        rows["prompt tokens read for it"] = count(prediction["tokens"])
    return rows
