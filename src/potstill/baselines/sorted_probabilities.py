"""Universal Logit Distillation: compare sorted probabilities, without regard to tokens.

N: the student's supervised tokens, M: the teacher's. At every aligned position

    cross-entropy + λ · Σ_i |p_(i) − q_(i)|             p_(1) ≥ p_(2) ≥ …, the shorter zero-padded

Source: Boizard et al. 2024, *Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
Loss for LLMs*, arXiv 2402.12030, section 4; λ = 1.5 is theirs. The paper pairs the t-th tokens of
both tokenizations; here positions are aligned by bytes, which favors the method. Only the abstract
was available; the rest is from memory.

Defects: sorting loses which token has which probability. A student that is as certain as its
teacher of a different token has distance 0. Only the cross-entropy teaches which token to write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.losses.closed_forms import LossAndGradient, cross_entropy
from potstill.losses.cross_tokenizer import teacher_projection
from potstill.losses.fused import as_head, fused_linear_loss
from potstill.losses.projection import CallableHead, Head

SORTED_WEIGHT = 1.5


def fused_linear_sorted(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | CallableHead,
    *,
    teacher_row: Tensor,
    labels: Tensor,
    teacher_labels: Tensor | None = None,
    sorted_weight: float = SORTED_WEIGHT,
    teacher_temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return cross-entropy in nats plus weighted distances, summed over tokens: a scalar.

    ``teacher_row [N]``: the index of the teacher's hidden state that predicts at the same byte; −1
    for none, where only cross-entropy counts.
    """
    projection = teacher_projection(
        teacher_hidden, teacher_head, teacher_row, teacher_labels, chunk_tokens
    )

    def score(logits: Tensor, positions: slice) -> LossAndGradient:
        q = (projection.logits(positions) / teacher_temperature).softmax(-1)
        distance, gradient = sorted_distance(q, logits.softmax(-1))
        loss, hard_gradient = cross_entropy(labels[positions], logits)
        weight = sorted_weight * (teacher_row[positions] >= 0)
        return loss + weight * distance, hard_gradient.addcmul_(gradient, weight[:, None])

    head = as_head(student_head)
    return fused_linear_loss(
        student_hidden, head, score, observed=labels, chunk_tokens=chunk_tokens
    )


def sorted_distance(q: Tensor, p: Tensor) -> LossAndGradient:
    """Return Σ_i |p_(i) − q_(i)| ``[b]`` and its gradient by the logits of p, ``[b, V_s]``.

    With s_w the sign at the rank of token w, the gradient is p ⊙ (s − Σ p s).
    """
    size, width = p.shape[-1], max(p.shape[-1], q.shape[-1])
    sorted_q = torch.nn.functional.pad(q.sort(-1, descending=True).values, (0, width - q.shape[-1]))
    sorted_p, ranked = p.sort(-1, descending=True)
    difference = torch.nn.functional.pad(sorted_p, (0, width - size)) - sorted_q
    sign = torch.empty_like(p).scatter_(-1, ranked, difference[:, :size].sign())
    return difference.abs().sum(-1), p * (sign - (p * sign).sum(-1, keepdim=True))
