"""Draw docs/one-principle.svg: four partitions of one distribution, and their gradient variance.

    python docs/pictures/one_principle.py

The bars on the right show the variance of the gradient for each partition.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

TOKENS = ["Rain", "R", "Water", "It", "A"]
Q = np.array([0.50, 0.25, 0.15, 0.07, 0.03])
PARTITIONS = {
    "text: one cell": [[0, 1, 2, 3, 4]],
    "top-k: two tokens,\nand the rest": [[0], [1], [2, 3, 4]],
    "cells of equal bytes:\n“Rain” begins with “R”": [[0, 1], [2], [3], [4]],
    "logits: every token\nits own cell": [[0], [1], [2], [3], [4]],
}
COLORS = ["#9ecae1", "#c7e9c0", "#fdd0a2", "#dadaeb", "#fcbba1"]


def gradient_variance(cells: list[list[int]]) -> float:
    """Return the variance of p − t̃, summed over logits, for a uniform student p.

    t̃ is the completed target of one token; the variance is over the token sampled from q.
    """
    p = np.full(len(Q), 1 / len(Q))
    gradients = []
    for observed in range(len(Q)):
        target = np.zeros(len(Q))
        for cell in cells:
            inside = p[cell] / p[cell].sum()
            target[cell] = Q[cell].sum() * inside
            if observed in cell:
                target[cell] -= inside
                target[observed] += 1
        gradients.append(p - target)
    spread = np.array(gradients) - Q @ np.array(gradients)
    return float(Q @ (spread**2).sum(-1))


def main() -> None:
    figure, axes = plt.subplots(figsize=(9, 3.4))
    edges = np.concatenate([[0], Q.cumsum()])
    for row, (name, cells) in enumerate(PARTITIONS.items()):
        y = len(PARTITIONS) - 1 - row
        for number, cell in enumerate(cells):
            left, right = edges[cell[0]], edges[cell[-1] + 1]
            axes.barh(
                y,
                right - left,
                left=left,
                height=0.6,
                color=COLORS[number],
                edgecolor="black",
                linewidth=1.4,
            )
            for token in cell:
                if token != cell[0]:
                    axes.plot(
                        [edges[token]] * 2,
                        [y - 0.3, y + 0.3],
                        color="black",
                        linewidth=0.6,
                        linestyle=(0, (2, 2)),
                    )
        axes.text(-0.02, y, name, ha="right", va="center", fontsize=9)
        variance = gradient_variance(cells)
        axes.barh(y, variance * 0.4, left=1.06, height=0.25, color="#636363")
        axes.text(1.075 + variance * 0.4, y, f"{variance:.2f}", va="center", fontsize=9)
    top = len(PARTITIONS) - 0.55
    for token, name in enumerate(TOKENS):
        axes.text(
            (edges[token] + edges[token + 1]) / 2,
            top,
            name,
            ha="center",
            fontsize=9,
            family="monospace",
        )
    axes.text(-0.02, top, "the teacher's q", ha="right", fontsize=9)
    axes.text(1.06, top, "variance of the gradient", fontsize=9)
    axes.set_axis_off()
    axes.set_xlim(-0.3, 1.42)
    plt.rcParams["svg.hashsalt"] = "potstill"
    figure.savefig(
        Path(__file__).parents[1] / "one-principle.svg",
        bbox_inches="tight",
        metadata={"Date": None},
    )


if __name__ == "__main__":
    main()
