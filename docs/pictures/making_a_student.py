"""Draw docs/making-a-student.svg: what is cut from a teacher, and to what the rest is refitted.

    python docs/pictures/making_a_student.py

The widths are those of a Llama model with three key/value groups; the layers are an example.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEACHER, REMOVED = 6, (2, 3)
GROUPS, NEURONS = 3, 8
KEPT_GROUPS, KEPT_NEURONS = (0, 2), (0, 1, 3, 6)
KEPT, CUT = "#9ecae1", "#f0f0f0"
FFN_KEPT = "#fdd0a2"
GOAL = "#d94801"


def box(axes: Axes, left: float, bottom: float, width: float, color: str, *, dashed: bool) -> None:
    style = {"edgecolor": "#969696" if dashed else "black", "linewidth": 0.8}
    axes.barh(bottom, width, left=left, height=0.5, color=color, align="edge", **style)
    if dashed:
        axes.plot([left, left + width], [bottom, bottom + 0.5], color="#969696", linewidth=0.5)


Parts = tuple[int, ...]


def layer(
    axes: Axes, left: float, bottom: float, counts: Parts, kept_groups: Parts, kept_neurons: Parts
) -> None:
    """Draw attention as its groups and the FFN as its neurons; what is cut is crossed out."""
    groups, neurons = counts
    for i in range(groups):
        is_kept = i in kept_groups
        box(axes, left + 0.4 * i, bottom, 0.4, KEPT if is_kept else CUT, dashed=not is_kept)
    start = left + 0.4 * groups + 0.25
    for i in range(neurons):
        is_kept = i in kept_neurons
        color = FFN_KEPT if is_kept else CUT
        box(axes, start + 0.2 * i, bottom, 0.2, color, dashed=not is_kept)


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "potstill"
    figure, axes = plt.subplots(figsize=(8.6, 4.2))
    everything = (tuple(range(len(KEPT_GROUPS))), tuple(range(len(KEPT_NEURONS))))
    right = 4.6
    kept_layers = [i for i in range(TEACHER) if i not in REMOVED]
    for i in range(TEACHER):
        removed = i in REMOVED
        kept = ((), ()) if removed else (KEPT_GROUPS, KEPT_NEURONS)
        layer(axes, 0, 0.8 * i, (GROUPS, NEURONS), *kept)
        name = f"layer {i}" + (", removed" if removed else "")
        axes.text(-0.12, 0.8 * i + 0.25, name, ha="right", va="center", fontsize=8)
    step = 0.8 * TEACHER / len(kept_layers)
    for new, old in enumerate(kept_layers):
        bottom = step * new
        counts = (len(KEPT_GROUPS), len(KEPT_NEURONS))
        layer(axes, right, bottom, counts, *everything)
        following = [*kept_layers, TEACHER][new + 1]
        goal = 0.8 * following - 0.15
        axes.annotate(
            "",
            xy=(right - 0.05, bottom + 0.5),
            xytext=(3.15, goal),
            arrowprops={"arrowstyle": "->", "color": GOAL, "linewidth": 1.1},
        )
        axes.plot([0, 3.1], [goal, goal], color=GOAL, linewidth=1, linestyle=(0, (4, 2)))
        axes.text(right + 2.05, bottom + 0.25, f"from layer {old}", va="center", fontsize=8)
    top = 0.8 * TEACHER + 0.35
    axes.text(0.6, top, "attention:\nkey/value groups", ha="center", fontsize=8)
    axes.text(2.25, top, "FFN:\nneurons", ha="center", fontsize=8)
    axes.text(-0.12, top + 0.35, "teacher", ha="right", fontsize=9, weight="bold")
    axes.text(right + 0.9, top + 0.35, "student", ha="center", fontsize=9, weight="bold")
    axes.text(
        0,
        -0.35,
        "dashed lines: the hidden states that a student's layer is refitted to give,\n"
        "where the next layer that is kept begins",
        fontsize=8,
        va="top",
        color=GOAL,
    )
    axes.set_axis_off()
    axes.set(xlim=(-1.5, right + 3.2), ylim=(-0.9, top + 0.6))
    figure.savefig(
        Path(__file__).parents[1] / "making-a-student.svg",
        bbox_inches="tight",
        metadata={"Date": None},
    )


if __name__ == "__main__":
    main()
