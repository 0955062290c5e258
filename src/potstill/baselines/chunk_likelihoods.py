"""Approximate Likelihood Matching: compare the probability of each span of text under both models.

N: the student's supervised tokens, M: the teacher's. A span is the smallest run of tokens that
covers the same bytes in both tokenizations; P is the product of its tokens' probabilities.

    Σ over spans  KL( (a, 1 − a) ‖ (b, 1 − b) )        a = P_teacher^(1/τ), b = P_student^(1/τ)

Source: Minixhofer, Vulić, Ponti 2025, *Universal Cross-Tokenizer Distillation via Approximate
Likelihood Matching*, arXiv 2503.20083; τ = 100 as in the authors' tokenkit, KL for f. Not included:
their debiasing (leaving out spans whose ends favor one tokenizer) and hidden-state matching. The
equation is from memory, checked against abstracts only.

Defects: it uses only the sampled text. The teacher's distribution gives one number per span: more
than cross-entropy uses, less than a comparison of distributions. With τ = 100 the loss is close to
the mean squared difference of log-likelihoods, with more weight on probable spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.losses.fused import as_any_head, as_head, fused_linear_cross_entropy
from potstill.losses.projection import CallableHead, Head, Projection, wide_dtype

CHUNK_TEMPERATURE = 100.0


def fused_linear_chunks(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | CallableHead,
    *,
    labels: Tensor,
    teacher_labels: Tensor,
    chunk: Tensor,
    teacher_chunk: Tensor,
    chunk_temperature: float = CHUNK_TEMPERATURE,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the divergence of span likelihoods, summed over spans: a scalar in nats.

    ``chunk [N]`` and ``teacher_chunk [M]`` are span numbers, the same on both sides; −1 for a token
    in no span, which has no loss. ``chunk_tokens`` is the number of tokens in one matrix product.

    A token's gradient needs the likelihood of its whole span, so the student is projected twice:
    first to get the likelihoods, then for the gradient, which is that of a cross-entropy with the
    weights ∂loss/∂(−log P) of each token's span.
    """
    head, teacher = as_head(student_head), as_any_head(teacher_head)
    spans = (chunk, teacher_chunk)
    count = 1 + max(int(numbers.max()) if len(numbers) else -1 for numbers in spans)
    with torch.no_grad():
        log_student = log_likelihoods(student_hidden, head, labels, chunk_tokens)
        log_teacher = log_likelihoods(teacher_hidden, teacher, teacher_labels, chunk_tokens)
        log_student = _per_span(log_student, chunk, count)
        log_teacher = _per_span(log_teacher, teacher_chunk, count)
        present = torch.zeros(count + 1, dtype=torch.bool, device=log_student.device)
        present[chunk] = True
        present[-1] = False
        loss, derivative = binary_divergence(log_teacher, log_student, chunk_temperature)
        value = (loss * present[:-1]).sum()
        weights = -torch.cat([derivative, derivative.new_zeros(1)])[chunk]
    # Only the gradient of this cross-entropy is used, not its value.
    surrogate = fused_linear_cross_entropy(
        student_hidden, head, labels, weights=weights, chunk_tokens=chunk_tokens
    )
    return value + (surrogate - surrogate.detach())


def log_likelihoods(
    hidden: Tensor, head: Head | CallableHead, labels: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Return log p(label) ``[N]`` in nats, without gradients."""
    log_p = torch.zeros(len(hidden), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    projection = Projection(hidden, head, observed=labels, chunk_tokens=chunk_tokens)
    for positions, logits in projection.blocks():
        nll = torch.nn.functional.cross_entropy(logits, labels[positions], reduction="none")
        log_p[positions] = -nll
    return log_p


def binary_divergence(
    log_teacher: Tensor, log_student: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return KL((a, 1 − a) ‖ (b, 1 − b)) and its derivative (b − a) / (1 − b) / τ by log_student.

    log a = ``log_teacher`` / τ, log b = ``log_student`` / τ. 1 − b is computed by expm1: at τ = 100
    it is about −log P / 100, which rounding b would lose.
    """
    tiny = torch.finfo(log_student.dtype).tiny
    log_a, log_b = (log / temperature for log in (log_teacher, log_student))
    rest_a, rest_b = (-torch.expm1(log) for log in (log_a, log_b))
    rest_b = rest_b.clamp_min(1e-12)  # finite logarithm and quotient where the student has P = 1
    loss = log_a.exp() * (log_a - log_b) + rest_a * (rest_a.clamp_min(tiny).log() - rest_b.log())
    return loss, (rest_a - rest_b) / rest_b / temperature


def _per_span(values: Tensor, span: Tensor, count: int) -> Tensor:
    """Sum over the tokens of each span, ``[count]``; drop tokens in no span."""
    index = torch.where(span < 0, count, span)
    return values.new_zeros(count + 1).index_add_(0, index, values)[:-1]
