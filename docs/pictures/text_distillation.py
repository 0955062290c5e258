"""Draw docs/text-distillation.svg: KL against the number of answers in the training data.

    python docs/pictures/text_distillation.py

This is the example of the page: eight tokens, and a teacher whose next token depends only on the
token before it. Each point is the mean of twenty seeds.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

ANSWERS = (8, 16, 32, 64, 128, 256, 512, 1024)
DRAWS, TOKENS, STEPS = 20, 16, 150
LINES = {
    "text at T = 1": "#d94801",
    "text at T = 0.7": "#fdae6b",
    "logits on the text at T = 1": "#2171b5",
}


def write(teacher: Tensor, answers: int, temperature: float) -> Tensor:
    """Sample answers ``[answers, TOKENS + 1]`` from the teacher; the first token is uniform."""
    text = [torch.randint(8, (answers,))]
    for _ in range(TOKENS):
        text.append(torch.multinomial((teacher[text[-1]] / temperature).softmax(-1), 1).squeeze(-1))
    return torch.stack(text, 1)


def learned(targets: Tensor) -> Tensor:
    """Train a student and return its log-probabilities ``[8, 8]``.

    ``targets[i, j]`` is how often token j comes after token i.
    """
    student = torch.zeros(8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(STEPS):
        loss = -(targets * student.log_softmax(-1)).sum() / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.detach().log_softmax(-1)


def counts(text: Tensor) -> Tensor:
    """Return how often token j comes after token i in ``text``, ``[8, 8]``."""
    return (
        torch.bincount(8 * text[:, :-1].flatten() + text[:, 1:].flatten(), minlength=64)
        .view(8, 8)
        .float()
    )


def distances(seed: int) -> list[list[float]]:
    """Return KL(teacher ‖ student) in nats per token: a row per ANSWERS, a column per LINES."""
    torch.manual_seed(seed)
    teacher = 2 * torch.randn(8, 8)
    q = teacher.log_softmax(-1)
    rows = []
    for answers in ANSWERS:
        text = counts(write(teacher, answers, 1.0))
        taught = (text, counts(write(teacher, answers, 0.7)), text.sum(-1, keepdim=True) * q.exp())
        rows.append(
            [float((q.exp() * (q - learned(targets))).sum(-1).mean()) for targets in taught]
        )
    return rows


def main() -> None:
    means = torch.tensor([distances(seed) for seed in range(DRAWS)]).mean(0)
    figure, axes = plt.subplots(figsize=(6, 3))
    for (name, color), column in zip(LINES.items(), means.T, strict=True):
        axes.loglog(ANSWERS, column, "o-", color=color, linewidth=1.4, markersize=3, label=name)
    axes.set_xticks(ANSWERS, list(map(str, ANSWERS)))
    axes.minorticks_off()
    axes.set_xlabel("number of answers in the training data")
    axes.set_ylabel("KL(teacher ‖ student), nats per token", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "potstill"
    figure.savefig(Path(__file__).parents[1] / "text-distillation.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
