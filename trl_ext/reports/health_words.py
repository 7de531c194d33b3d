"""
What the health checks found in a run, in words. A run that was watched has logged when an alarm began and ended; over
the log of any other run the checks are done now, with their defaults.
"""

from dataclasses import dataclass, field

from ..monitors.health import CHECKS
from ..monitors.health_check import METRIC_PREFIX, HealthCheck
from .run_files import Run, TrainedStage


# What the value of a check is
QUANTITIES = {
    "kl": "KL to the reference, nats a completion",
    "preference_accuracy": "share of pairs ranked right",
    "entropy": "entropy, nats a token",
    "reward_hacking": "fall of the held-out metric while the reward rises",
    "length": "mean length of completions, tokens (or the share of a limit that moves)",
    "explained_variance": "explained variance of the critic",
}


@dataclass
class Finding:
    """
    What a check found in one stage.

    Args:
        check (`str`):
            Its name.
        stage (`str`):
            Name of the stage; `""` for the only one.
        value (`float`, *optional*):
            The quantity in the last log that has it; `None`: it wasn't logged.
        episodes (`list[tuple[int, int]]`):
            Steps of the run at which alarms began and ended; an alarm that lasts ends with the stage.
        messages (`list[str]`):
            What was wrong, and what to try.
        lasts (`bool`):
            Whether the last alarm never ended.
    """

    check: str
    stage: str
    value: float | None = None
    episodes: list[tuple[int, int]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    lasts: bool = False

    @property
    def words(self) -> str:
        """The finding as a sentence or two."""
        if self.value is None:
            return "Not measured: its quantity was not logged."
        at_the_end = f"{QUANTITIES.get(self.check, self.check)}: {self.value:.3g} at the end."
        if not self.episodes:
            return f"In its range. {at_the_end}"
        when = " and ".join(f"from step {begun} to {ended}" for begun, ended in self.episodes)
        still = ", to the end of training" if self.lasts else ""
        return f"Out of its range {when}{still}. {at_the_end} {' '.join(dict.fromkeys(self.messages))}"


def findings(run: Run) -> list[Finding]:
    """Every default check on every stage of a run, in order."""
    return [_look(kind(), stage) for stage in run.stages for kind in CHECKS]


def measured(run: Run) -> list[Finding]:
    """The findings of the checks whose quantity was logged."""
    return [finding for finding in findings(run) if finding.value is not None]


def _look(check: HealthCheck, stage: TrainedStage) -> Finding:
    found, key = Finding(check.name, stage.name), f"{METRIC_PREFIX}{check.name}_alarm"
    was_watched = any(key in entry for entry in stage.log_history)
    begun: int | None = None
    for entry in stage.log_history:
        step = int(entry.get("step", 0))
        alarm = check.observe(entry, step, stage.max_steps)
        if alarm is not None:
            found.messages.append(alarm.message.partition(": ")[2])
        if check.value is None:
            continue
        found.value = check.value
        alarmed = bool(entry.get(key, begun is not None)) if was_watched else check.in_episode
        if alarmed and begun is None:
            begun = stage.start + step
        elif not alarmed and begun is not None:
            found.episodes.append((begun, stage.start + step))
            begun = None
    if begun is not None:
        found.episodes.append((begun, stage.start + stage.steps))
        found.lasts = True
    if not found.episodes:
        found.messages = []
    elif not found.messages:  # the run was watched with other settings
        found.messages = [f"It left the range that the run was watched for. {check.advice}"]
    return found
