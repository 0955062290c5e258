"""Compare padded logits at the last token: a common mistake across tokenizers, kept to measure it.

    KL(q ‖ p) at the last token of each conversation, the shorter logit vector padded with zeros

Source: teaching examples that take ``logits[:, -1, :]`` of both models and pad the shorter one.

Defects: it compares equal ids of two vocabularies, which are unrelated tokens (of the 32 000 ids
that Llama-3 and Llama-2 have in common, 8 mean the same bytes), so renumbering a vocabulary changes
the loss. Only one position of a conversation teaches. And a padded logit of 0 does not mean
probability 0: it has weight e⁰ in the softmax.
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
    """Return KL between padded logits, summed over conversations: a scalar in nats.

    ``conversation [N]`` and ``teacher_conversation [M]`` number each hidden state's conversation,
    −1 for none. A conversation without tokens on one side is left out.
    """
    student, teacher = as_head(student_head), as_any_head(teacher_head)
    last, teacher_last = last_positions(conversation), last_positions(teacher_conversation)
    shared = sorted(last.keys() & teacher_last.keys())
    width = max(len(student), len(teacher))
    last_hidden = student_hidden[[last[c] for c in shared]]
    teacher_last_hidden = teacher_hidden[[teacher_last[c] for c in shared]]
    projection = Projection(teacher_last_hidden, teacher, chunk_tokens=chunk_tokens)

    def score(logits: Tensor, positions: slice) -> LossAndGradient:
        size = logits.shape[-1]
        teacher_logits = _padded(projection.logits(positions), width)
        loss, gradient = forward_kl(teacher_logits, _padded(logits, width))
        return loss, gradient[:, :size]

    return fused_linear_loss(last_hidden, student, score, chunk_tokens=chunk_tokens)


def last_positions(conversation: Tensor) -> dict[int, int]:
    """Return the last position of each conversation."""
    return {number: i for i, number in enumerate(conversation.tolist()) if number >= 0}


def _padded(logits: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(logits, (0, width - logits.shape[-1]))
