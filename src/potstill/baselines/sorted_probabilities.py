"""Universal Logit Distillation: compare how peaked two distributions are, whatever their tokens.

N the student's supervised tokens, M the teacher's, V the larger of the two vocabularies. At every aligned position

    cross-entropy + λ · Σ_i |p_(i) − q_(i)|             p_(1) ≥ p_(2) ≥ …, the shorter vector filled up with zeros

Source: Boizard et al. 2024, *Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs*, arXiv
2402.12030, section 4; λ = 1.5 is theirs. The paper compares the t-th token of one tokenization with the t-th of the other; here
positions are aligned by bytes, which is kinder to it. We had the abstract at hand, and the rest from memory.

What it gets wrong: after sorting nobody knows which token had which probability. A student as sure as its teacher of something
else has loss 0, so all that says *what* to write is the cross-entropy; the rest says how sure to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.losses.closed_forms import LossAndGradient, cross_entropy
from potstill.losses.fused import as_any_head, as_head, fused_linear_loss
from potstill.losses.projection import CallableHead, Head, Projection

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
    """Cross-entropy, and ``sorted_weight`` times the distance of sorted probabilities, summed over tokens: nats (and shares).

    ``teacher_row [N]``: which of the teacher's M hidden states predicts at the same byte; −1 for none, and cross-entropy alone.
    """
    student, teacher = as_head(student_head), as_any_head(teacher_head)
    known, row = teacher_row >= 0, teacher_row.clamp_min(0)
    if not len(teacher_hidden):
        teacher_hidden = teacher_hidden.new_zeros(1, teacher_hidden.shape[-1])
    observed = None if teacher_labels is None or not len(teacher_labels) else teacher_labels[row]
    source = Projection(teacher_hidden[row], teacher, observed=observed, chunk_tokens=chunk_tokens)

    def score(logits: Tensor, rows: slice) -> LossAndGradient:
        q = (source.logits(rows) / teacher_temperature).softmax(-1)
        distance, gradient = sorted_distance(q, logits.softmax(-1))
        loss, hard_gradient = cross_entropy(labels[rows], logits)
        weight = sorted_weight * known[rows]
        return loss + weight * distance, hard_gradient.addcmul_(gradient, weight[:, None])

    return fused_linear_loss(student_hidden, student, score, observed=labels, chunk_tokens=chunk_tokens)


def sorted_distance(q: Tensor, p: Tensor) -> LossAndGradient:
    """Σ_i |p_(i) − q_(i)| ``[b]``, and its gradient with respect to the logits of p, ``[b, V_s]``.

    With s_w the sign at the rank of token w the gradient is p ⊙ (s − Σ p s).
    """
    width = max(p.shape[-1], q.shape[-1])
    teachers = torch.nn.functional.pad(q.sort(-1, descending=True).values, (0, width - q.shape[-1]))
    sorted_p, ranked = p.sort(-1, descending=True)
    difference = torch.nn.functional.pad(sorted_p, (0, width - p.shape[-1])) - teachers
    sign = torch.empty_like(p).scatter_(-1, ranked, difference[:, : p.shape[-1]].sign())
    return difference.abs().sum(-1), p * (sign - (p * sign).sum(-1, keepdim=True))
