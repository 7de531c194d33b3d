"""
What a policy wrote for held-out prompts, so that a person can read what a mean hides: the texts of the first prompts
at every measurement, in one file of JSON lines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object


HELD_OUT_TEXTS = "held_out_completions.jsonl"
MOST_PROMPTS = 64  # of which texts are kept; all are measured


@dataclass(frozen=True)
class PromptTexts:
    """
    A held-out prompt, and what the policy wrote for it.

    Args:
        prompt (`str`):
            The prompt; a conversation as lines that begin with the roles.
        completions (`list[str]`):
            G completions, as the reward functions saw them.
        rewards (`dict[str, list[float]]`):
            G rewards by the name of the function, `None` where it didn't apply.
    """

    prompt: str
    completions: list[str]
    rewards: dict[str, list[float | None]]

    def mean(self, metric: str) -> float | None:
        """The mean reward over the completions to which a function applied; `None` if it applied to none."""
        found = [value for value in self.rewards.get(metric, ()) if value is not None]
        return sum(found) / len(found) if found else None

    def typical(self, metric: str) -> int:
        """The completion whose reward is nearest to the mean, the first one of several."""
        mean, rewards = self.mean(metric), self.rewards.get(metric, [])
        known = [i for i, value in enumerate(rewards) if value is not None]
        return min(known, key=lambda i: abs(float(rewards[i] or 0.0) - float(mean or 0.0)), default=0)


def texts_of(scored: Any, prompts: int) -> list[PromptTexts]:
    """
    The texts of a batch that was measured. Every process must make the call.

    Args:
        scored ([`~trl_ext.rollouts.rollout.ScoredGroups`]):
            What `roll_out` returned. Texts that it doesn't have are empty.
        prompts (`int`):
            How many of its prompts to take, from the first.
    """
    local = [
        (plain_text(rollout.prompt), plain_text(rollout.completion)) for rollout in getattr(scored, "rollouts", ())
    ]
    written: list[tuple[str, str]] = gather_object(local)
    samples = scored.rewards.size(1)
    found = []
    for i, rewards in enumerate(scored.rewards[:prompts].tolist()):  # G lists of F
        own = written[i * samples : (i + 1) * samples] or [("", "")] * samples
        by_name = {
            name: [None if value != value else value for value in column]  # NaN: doesn't apply
            for name, column in zip(scored.reward_func_names, zip(*rewards, strict=True), strict=True)
        }
        found.append(PromptTexts(own[0][0], [completion for _, completion in own], by_name))
    return found


def plain_text(messages: Any) -> str:
    """A text as it is; of a conversation, its messages, each after its role."""
    if not isinstance(messages, list):
        return str(messages)
    lines = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else message
        if isinstance(content, list):  # parts, some of which may be images
            content = " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content)
        role = f"{message.get('role')}: " if isinstance(message, Mapping) else ""
        lines.append(f"{role}{'' if content is None else content}")
    return "\n".join(lines)


def write_texts(file: str | Path, step: int, texts: Sequence[PromptTexts]) -> None:
    """Adds the texts of a measurement at an optimizer step, in place of those that the file has of this step."""
    file = Path(file)
    kept = [] if not file.is_file() else [line for line in _lines(file) if json.loads(line)["step"] != step]
    lines = [*kept, *(json.dumps({"step": step, **asdict(one)}, ensure_ascii=False) for one in texts)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_texts(file: str | Path) -> dict[int, list[PromptTexts]]:
    """The texts of every measurement by its optimizer step, in rising order. Empty if there is no such file."""
    found: dict[int, list[PromptTexts]] = {}
    for line in _lines(Path(file)) if Path(file).is_file() else ():
        entry = json.loads(line)
        found.setdefault(entry.pop("step"), []).append(PromptTexts(**entry))
    return dict(sorted(found.items()))


def _lines(file: Path) -> list[str]:
    # Not `splitlines`, which also splits at separators that JSON leaves as they are
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line]


@dataclass(frozen=True)
class Change:
    """
    A held-out prompt before and after training.

    Args:
        prompt (`str`):
            The prompt.
        before, after (`str`):
            A typical completion of each policy: the one whose reward is nearest to the mean.
        reward_before, reward_after (`float`):
            Mean rewards of its completions.
    """

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float

    @property
    def gain(self) -> float:
        return self.reward_after - self.reward_before


def changes(before: Sequence[PromptTexts], after: Sequence[PromptTexts], metric: str) -> list[Change]:
    """The prompts that both measurements have, in which the metric applied; the largest gain first."""
    found = []
    for old, new in zip(before, after, strict=False):
        was, became = old.mean(metric), new.mean(metric)
        if old.prompt == new.prompt and was is not None and became is not None:
            wrote, writes = (one.completions[one.typical(metric)] for one in (old, new))
            found.append(Change(old.prompt, wrote, writes, was, became))
    return sorted(found, key=lambda change: -change.gain)
