"""Draw docs/divergences.svg: a student with one peak, fitted to a teacher with two peaks.

Each panel minimizes one divergence.

    python docs/pictures/divergences.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from potstill.losses import DIVERGENCES

TOKENS = torch.arange(60.0)
TEACHER = torch.logsumexp(
    torch.stack(
        [
            torch.tensor(weight).log() - (TOKENS - place) ** 2 / 18
            for weight, place in ((0.6, 17.0), (0.4, 42.0))
        ]
    ),
    0,
)[None]


def one_peak(place: Tensor, width: Tensor) -> Tensor:
    """Return logits ``[1, 60]`` whose softmax is a bell curve."""
    return (-((TOKENS - place) ** 2) / (2 * width**2))[None]


def best_student(divergence: Callable[..., Tensor]) -> Tensor:
    """Return probabilities ``[60]`` of the bell curve with the least divergence (a grid search)."""
    places, widths = torch.arange(5.0, 55.0, 0.5), torch.arange(1.5, 20.0, 0.25)
    students = torch.cat([one_peak(place, width) for place in places for width in widths])
    least = divergence(TEACHER.expand_as(students), students).argmin()
    return students[least].softmax(-1)


def main() -> None:
    figure, grid = plt.subplots(2, 3, figsize=(9, 3.6), sharex=True, sharey=True)
    for axes, (name, divergence) in zip(grid.flat, DIVERGENCES.items(), strict=True):
        axes.fill_between(
            TOKENS, TEACHER[0].softmax(-1), color="#c6dbef", step="mid", label="teacher"
        )
        axes.step(
            TOKENS,
            best_student(divergence),
            where="mid",
            color="#d94801",
            linewidth=1.4,
            label="student",
        )
        axes.set_title(name, fontsize=9, family="monospace")
        axes.set_xticks([])
        axes.set_yticks([])
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "potstill"
    figure.savefig(Path(__file__).parents[1] / "divergences.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
