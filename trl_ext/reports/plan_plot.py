"""The picture of a plan: what a GPU holds in each phase, against what it has."""

from pathlib import Path

from matplotlib.figure import Figure

from ..planner.layouts import GIB
from ..planner.phases import SPARE
from ..planner.plan import Plan
from .plots import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILION


# Parts by what they are for, from what stays to what comes and goes
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base weights": (BLUE, ("base weights",)),
    "other roles": (SKY, ("adapter", "critic", "reward", "reference")),
    "gradients and optimizer": (
        GREEN,
        ("gradients", "gradient buckets", "optimizer", "gradients in float32, at the step"),
    ),
    "gathered weights": (
        ORANGE,
        ("weights gathered", "weights gathered for vLLM", "a layer dequantized"),
    ),
    "KV cache, vLLM": (VERMILION, ("KV cache", "KV cache, a layer as it grows", "vLLM")),
}
OTHER = "activations, logits"
REST = "CUDA, NCCL, fragmentation"


def kind_of(part: str) -> str:
    """The kind that a part of a phase is drawn as."""
    if part in SPARE:
        return REST
    return next((kind for kind, (_, parts) in KINDS.items() if part in parts), OTHER)


def plot_plan(plan: Plan, path: str | Path, title: str) -> Path:
    """
    Draws stacked bars, one for each phase, and the GPU's memory as a line. No display is needed.

    Args:
        plan ([`~trl_ext.planner.plan.Plan`]):
            The plan.
        path (`str` or `Path`):
            Where the PNG goes.
        title (`str`):
            Heading of the figure.

    Returns:
        `Path`: `path`.
    """
    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    colours = {kind: colour for kind, (colour, _) in KINDS.items()} | {OTHER: "#CC79A7", REST: GREY}
    names = [phase.name for phase in plan.phases]
    below = [0.0] * len(names)
    for kind, colour in colours.items():
        sizes = [
            sum(size for part, size in phase.parts.items() if kind_of(part) == kind) / GIB for phase in plan.phases
        ]
        if any(sizes):
            axis.bar(
                names, sizes, bottom=below, color=colour, width=0.62, label=kind, edgecolor="white", linewidth=0.6
            )
        below = [start + size for start, size in zip(below, sizes, strict=True)]
    for i, top in enumerate(below):
        axis.annotate(f"{top:.1f}", (i, top), (0, 3), textcoords="offset points", ha="center", color=INK, fontsize=9)
    axis.axhline(plan.job.layout.gpu_bytes / GIB, color=INK, linewidth=1.2, linestyle="--", label="memory of a GPU")
    axis.set_ylabel("GiB on a GPU", fontsize=9, color=INK)
    axis.tick_params(labelsize=9, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)
    return Path(path)
