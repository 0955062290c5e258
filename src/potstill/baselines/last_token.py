"""Distillation across tokenizers as it is often first written down, and should not be: kept to show what it gets wrong.

    KL(q ‖ p) at the last token of each conversation, the smaller of the two vectors of logits filled up with zeros

Source: teaching examples that take ``logits[:, -1, :]`` of both models and pad what does not fit.

What it gets wrong: everything that can be. Id 1 234 of the teacher is compared with id 1 234 of the student, two tokens that have
nothing to do with each other (of the 32 000 ids that Llama-3 and Llama-2 have in common, 8 mean the same bytes), so relabelling
a vocabulary changes the loss. One position of a conversation teaches, where the others are as good. And a logit of 0 is not
probability 0: it is weight e⁰ beside the others'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.losses.closed_forms import LossAndGradient, forward_kl
from potstill.losses.fused import as_any_head, as_head, fused_linear_loss
from potstill.losses.projection import CallableHead, Head, Projection


def fused_linear_last_token(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | CallableHead,
    *,
    conversation: Tensor,
    teacher_conversation: Tensor,
    chunk_tokens: int | None = None,
) -> Tensor:
    """KL between padded logits, summed over conversations: a scalar in nats, with gradients for the student.

    ``conversation [N]`` and ``teacher_conversation [M]`` say which conversation each hidden state is of. A conversation that one
    of the two has no tokens of is left out.
    """
    student, teacher = as_head(student_head), as_any_head(teacher_head)
    last, teacher_last = last_rows(conversation), last_rows(teacher_conversation)
    both = sorted(last.keys() & teacher_last.keys())
    width = max(len(student), len(teacher))
    source = Projection(teacher_hidden[[teacher_last[c] for c in both]], teacher, chunk_tokens=chunk_tokens)

    def score(logits: Tensor, rows: slice) -> LossAndGradient:
        size = logits.shape[-1]
        loss, gradient = forward_kl(_padded(source.logits(rows), width), _padded(logits, width))
        return loss, gradient[:, :size]

    return fused_linear_loss(student_hidden[[last[c] for c in both]], student, score, chunk_tokens=chunk_tokens)


def last_rows(conversation: Tensor) -> dict[int, int]:
    """For each conversation the last row that is of it."""
    return {number: row for row, number in enumerate(conversation.tolist()) if number >= 0}


def _padded(logits: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(logits, (0, width - logits.shape[-1]))
