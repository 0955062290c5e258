"""Check the loss before the first step.

Three properties hold for every summed loss; a mistake in heads, alignment, masking or normalization
breaks one:

    a head's logits are its model's            an architecture may transform logits in other ways
    the teacher's loss against itself is 0     a shift by one position gives several nats
    a batch's loss is the sum of its halves'   not if it is a mean, or tokens see another row

The check takes a few forward passes on a few conversations, without gradients, dropout or random
numbers: the training run afterwards is bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import SelfCheckFailed
from potstill.models.heads import on_device
from potstill.models.logits_check import check_logits, precision_of, working_dtype
from potstill.protocols import Batch
from potstill.training.objectives import Objective

Encoded = dict[str, Any]
Layout = Callable[[list[Encoded]], Batch]
Device = torch.device | str
CONVERSATIONS = 4
SELF_TOLERANCE = {"full": 1e-4, "half": 1e-3}
"""Nats per token. Both sides use the same products, so only their order can differ."""
HALVES_TOLERANCE = {"full": (1e-3, 1e-5), "half": (3e-2, 1e-2)}
"""Relative, and nats per token. Padding and packing differ, and so does rounding."""


@torch.no_grad()
def check_objective(
    objective: Objective,
    student: nn.Module,
    rows: list[Encoded],
    *,
    layout: Layout | None = None,
    device: Device = "cpu",
) -> None:
    """Check ``objective`` on a few encoded conversations ``rows``.

    Raises: SelfCheckFailed; NonFiniteLoss for logits that are not finite.

    ``layout`` replaces the objective's own. Autocast's precision, if on, sets the tolerances.
    """
    was_training = student.training
    student.eval()
    try:
        check_logits("student", student, rows[0]["input_ids"], device)
        with torch.autocast(torch.device(device).type, enabled=False):
            teacher: Any = None if objective.teacher is None else objective.teacher.model
            if teacher is not None:
                ids: Any = rows[0].get("teacher_input_ids", rows[0]["input_ids"])
                check_logits("teacher", teacher, ids, teacher.device)
            _check_self_divergence(objective.self_divergence(rows), objective, rows)
        if len(rows) > 1:
            _check_halves(objective, student, rows, layout or objective.layout, device)
    finally:
        student.train(was_training)


def _check_self_divergence(nats: Tensor | None, objective: Objective, rows: list[Encoded]) -> None:
    if nats is None:
        return
    tokens = max(_tokens(rows, "labels"), _tokens(rows, "teacher_labels"))
    error = float(nats) / max(1, tokens)
    # The trainer has a better message for NaN.
    if abs(error) > SELF_TOLERANCE[precision_of(_teacher_dtype(objective))]:
        raise SelfCheckFailed(
            f"self-check: the teacher is {error:.3g} nats per token away from itself, and must be "
            "0: the loss compares different positions or different heads; this is a mistake in the "
            "objective or its teacher"
        )


def _check_halves(
    objective: Objective, student: nn.Module, rows: list[Encoded], layout: Layout, device: Device
) -> None:
    def loss(part: list[Encoded]) -> float:
        return float(objective.summed_loss(student, on_device(layout(part), device)))

    half = len(rows) // 2
    whole, halves = loss(rows), loss(rows[:half]) + loss(rows[half:])
    tokens = max(1, _tokens(rows, "labels"))
    relative, absolute = HALVES_TOLERANCE[precision_of(working_dtype(student, device))]
    allowed = relative * abs(whole) + absolute * tokens
    if abs(whole - halves) > allowed:
        raise SelfCheckFailed(
            f"self-check: the loss of {len(rows)} conversations is {whole:.6g} nats and that of "
            f"their two halves {halves:.6g}; they must be equal: a loss is a sum over tokens, "
            "none of which sees the rest of the batch"
        )


def _teacher_dtype(objective: Objective) -> torch.dtype:
    model = None if objective.teacher is None else objective.teacher.model
    return torch.float32 if model is None else model.dtype


def _tokens(rows: list[Encoded], column: str) -> int:
    return sum(label != -100 for row in rows for label in row.get(column, ()))
