"""Before the first step: is the loss what it says?

Three things must hold for any summed loss, whatever it compares, and a mistake in heads, alignment, masking or normalization breaks
one:

    a head's logits are its model's                an architecture may do more to them than potstill knows of
    the teacher is at no distance from itself      put in the student's place it goes the student's way to its hidden states, and
                                                   the target comes the teacher's way; a shift by one position is several nats
    the loss of a batch is that of its two halves   a mean over what is in the batch, or a token that sees its neighbour, is not

It costs a handful of forward passes of a few conversations, without gradients and dropout, and draws no random numbers: the run
that follows is the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import SelfCheckFailed
from potstill.models.heads import head_logits, unwrapped
from potstill.training.objectives import Objective

CONVERSATIONS = 4
TOKENS = 64
LOGITS_TOLERANCE = {"full": 1e-3, "half": 2e-2}
"""Of the largest logit."""
SELF_TOLERANCE = {"full": 1e-4, "half": 1e-3}
"""Nats a token: both ways lead through the same products, so little but their order can differ."""
HALVES_TOLERANCE = {"full": (1e-3, 1e-5), "half": (3e-2, 1e-2)}
"""Of the loss, and nats a token: padding and packing differ between a batch and its halves, and so do roundings."""


@torch.no_grad()
def check_objective(
    objective: Objective, student: nn.Module, rows: list[dict[str, Any]], *, layout: Any = None, device: Any = "cpu"
) -> None:
    """Check ``objective`` on a few encoded ``rows``. Raises: SelfCheckFailed that says which failed, and by how much.

    ``layout`` makes batches of rows, if not the objective's own. Under autocast its precision is that of the check.
    """
    was_training = student.training
    student.eval()
    try:
        _check_logits("student", student, rows[0]["input_ids"], device)
        with torch.autocast(torch.device(device).type, enabled=False):
            teacher: Any = None if objective.teacher is None else objective.teacher.model
            if teacher is not None:
                ids = rows[0].get("teacher_input_ids", rows[0]["input_ids"])
                _check_logits("teacher", teacher, ids, teacher.device)
            _check_self_divergence(objective.self_divergence(rows), objective, rows)
        if len(rows) > 1:
            _check_halves(objective, student, rows, layout or objective.layout, device)
    finally:
        student.train(was_training)


def _check_logits(name: str, model: nn.Module, ids: list[int], device: Any) -> None:
    """What the model itself makes of its last hidden states, against what our losses make of them."""
    inputs = {"input_ids": torch.tensor([ids[:TOKENS]], device=device)}
    theirs = model(**inputs, use_cache=False).logits[0].float()
    ours = head_logits(model, inputs)[0, :, : theirs.shape[-1]].float().to(theirs.device)
    off = float((theirs - ours).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if off > LOGITS_TOLERANCE[_precision(_working_dtype(model, device))]:
        raise SelfCheckFailed(
            f"self-check: the logits of the {name}, {type(unwrapped(model)).__name__}, are {off:.1%} off those of its head: its "
            "architecture does something to them that potstill does not know (a scale, a cap); open an issue with its config.json"
        )


def _check_self_divergence(nats: Tensor | None, objective: Objective, rows: list[dict[str, Any]]) -> None:
    if nats is None:
        return
    tokens = max(_tokens(rows, "labels"), _tokens(rows, "teacher_labels"))
    off = float(nats) / max(1, tokens)
    if abs(off) > SELF_TOLERANCE[_precision(_teacher_dtype(objective))]:  # what is not a number, the trainer reports better
        raise SelfCheckFailed(
            f"self-check: the teacher is {off:.3g} nats a token away from itself, and must be 0: what the loss compares does not "
            "stand at the same positions or comes from different heads; this is a mistake in the objective or its teacher"
        )


def _check_halves(objective: Objective, student: nn.Module, rows: list[dict[str, Any]], layout: Any, device: Any) -> None:
    half = len(rows) // 2
    whole, *parts = (
        float(objective.summed_loss(student, {name: tensor.to(device) for name, tensor in layout(part).items()}))
        for part in (rows, rows[:half], rows[half:])
    )
    tokens = max(1, _tokens(rows, "labels"))
    relative, absolute = HALVES_TOLERANCE[_precision(_working_dtype(student, device))]
    allowed = relative * abs(whole) + absolute * tokens
    if abs(whole - sum(parts)) > allowed:
        raise SelfCheckFailed(
            f"self-check: the loss of {len(rows)} conversations is {whole:.6g} nats and that of their two halves {sum(parts):.6g}; "
            "they must be equal: a loss is a sum over tokens, none of which sees the rest of the batch"
        )


def _precision(dtype: torch.dtype) -> str:
    return "half" if dtype in (torch.bfloat16, torch.float16) else "full"


def _teacher_dtype(objective: Objective) -> torch.dtype:
    model = None if objective.teacher is None else objective.teacher.model
    return torch.float32 if model is None else model.dtype


def _working_dtype(student: nn.Module, device: Any) -> torch.dtype:
    """What the student computes in: autocast's dtype where it is on."""
    kind = torch.device(device).type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return next(student.parameters()).dtype


def _tokens(rows: list[dict[str, Any]], column: str) -> int:
    return sum(label != -100 for row in rows for label in row.get(column, ()))
