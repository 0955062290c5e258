"""Estimate what a teacher outside of the training process takes: disk, and network traffic.

N supervised tokens in the teacher's tokenizer, T tokens, H hidden size, V rows of the head, b bytes
of a number in the teacher's precision:

    states   N·b·H              states8   N·(H + 4)            sparse   about 33·N
    a step of a served teacher: b·H a supervised token back, 25 bytes a token there
    the LM head, once in any case: b·V·H
"""

from __future__ import annotations

from dataclasses import dataclass

from potstill.doctor.cost import BYTES, ModelSize, Plan

SPARSE_BYTES = 33
"""Per supervised token, at the default threshold (benchmarks/captures.py)."""
REQUEST_BYTES = 25
"""Per token of a request: its id, its position, the mask, and whether it is supervised."""


@dataclass(frozen=True)
class Storage:
    """Bytes of a captured and of a served teacher."""

    captured_bytes: dict[str, float]
    """Of all conversations, by what is kept; without the head."""
    head_bytes: float
    """Of the LM head, once."""
    served_bytes_a_step: float
    """Of a step's request and reply."""


def storage(
    method: str, teacher: ModelSize, plan: Plan, conversations: int | None
) -> Storage | None:
    """Return what a captured or served teacher takes; None for ``text``, which needs none.

    ``conversations`` are those of the data; None are those of the plan's steps.
    """
    if method == "text":
        return None
    if conversations is None:
        conversations = plan.steps * plan.conversations_a_step
    width = BYTES[plan.precision]
    supervised = conversations * plan.teacher_supervised
    kept = {
        "states": supervised * width * teacher.hidden_size,
        "states8": supervised * (teacher.hidden_size + 4),
    }
    if method == "logits":
        kept["sparse"] = supervised * SPARSE_BYTES
    reply = plan.teacher_supervised * width * teacher.hidden_size
    return Storage(
        captured_bytes=kept,
        head_bytes=width * teacher.vocabulary_rows * teacher.hidden_size,
        served_bytes_a_step=plan.conversations_a_step
        * (reply + REQUEST_BYTES * plan.teacher_tokens),
    )
