"""Draw docs/on-policy.svg: how often a student leaves the teacher's text, by position."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

LENGTH = 256
MISTAKES = [(0.002, "1 token in 500"), (0.01, "1 in 100"), (0.05, "1 in 20")]


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "potstill"
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    position = np.arange(1, LENGTH + 1)
    colors = ("#2171b5", "#6a51a3", "#d94801")
    for (mistakes, name), color in zip(MISTAKES, colors, strict=True):
        left = 1 - (1 - mistakes) ** (position - 1)
        axes.plot(position, 100 * left, color=color)
        at = int(0.35 * LENGTH) if mistakes > 0.01 else int(0.8 * LENGTH)
        axes.annotate(name, (at, 100 * left[at]), (0, -14), textcoords="offset points", color=color)
    axes.set(
        xlabel="position in the student's answer",
        ylabel="answers that have left the\nteacher's text, in per cent",
        xlim=(0, LENGTH),
        ylim=(0, 104),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent.parent / "on-policy.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
