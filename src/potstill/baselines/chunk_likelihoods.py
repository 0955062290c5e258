"""Approximate Likelihood Matching: how likely is the same piece of text to both models?

N the student's supervised tokens, M the teacher's, G chunks: the smallest runs of tokens that cover the same bytes in both
tokenizations. With P a chunk's probability, the product of its tokens',

    Σ over chunks  KL( (a, 1 − a) ‖ (b, 1 − b) )        a = P_teacher^(1/τ), b = P_student^(1/τ)

Source: Minixhofer, Vulić, Ponti 2025, *Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching*, arXiv
2503.20083; τ = 100 as in the authors' tokenkit, KL for f. Not here: leaving out chunks whose ends bias one tokenizer against the
other (their debiasing), and their matching of hidden states. The equation is from memory, checked against abstracts alone.

What it gets wrong: it looks at nothing but the text that was sampled. Of the teacher's whole distribution one number a chunk is
used, so it learns more than cross-entropy (how likely, not only that) and less than any method that compares distributions. With
τ = 100 it is near to the mean squared difference of log-likelihoods, weighted towards likely chunks.
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
    """The divergence of chunk likelihoods, summed over chunks: a scalar in nats, with gradients for the student.

    ``chunk [N]`` and ``teacher_chunk [M]`` number the chunks, alike on both sides; −1 for a token in none, which nothing teaches.

    A token's gradient needs the likelihood of its whole chunk, so the student is projected twice (4a + b, not 3a + b): for the
    likelihoods, and then for the gradient, which is that of a cross-entropy in which each token counts with ∂loss/∂(−log P) of
    its chunk.
    """
    head = as_head(student_head)
    count = 1 + max(int(numbers.max()) if len(numbers) else -1 for numbers in (chunk, teacher_chunk))
    with torch.no_grad():
        ours = _per_chunk(log_likelihoods(student_hidden, head, labels, chunk_tokens), chunk, count)
        theirs = _per_chunk(
            log_likelihoods(teacher_hidden, as_any_head(teacher_head), teacher_labels, chunk_tokens), teacher_chunk, count
        )
        present = torch.zeros(count + 1, dtype=torch.bool, device=ours.device)
        present[chunk] = True
        present[-1] = False
        loss, slope = binary_divergence(theirs, ours, chunk_temperature)
        value = (loss * present[:-1]).sum()
        weights = -torch.cat([slope, slope.new_zeros(1)])[chunk]
    # The value of this is no loss; its gradient is the loss's.
    carrier = fused_linear_cross_entropy(student_hidden, head, labels, weights=weights, chunk_tokens=chunk_tokens)
    return value + (carrier - carrier.detach())


def log_likelihoods(hidden: Tensor, head: Head, labels: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """log p(label) ``[N]``, a chunk of logits at a time, without gradients."""
    found = torch.zeros(len(hidden), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    for rows, logits in Projection(hidden, head, observed=labels, chunk_tokens=chunk_tokens).blocks():
        found[rows] = -torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")
    return found


def binary_divergence(log_teacher: Tensor, log_student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL((a, 1 − a) ‖ (b, 1 − b)) with log a = ``log_teacher`` / τ and log b = ``log_student`` / τ, and ∂/∂``log_student``.

    The slope is (b − a) / (1 − b) / τ. 1 − b is taken from log b by expm1: at τ = 100 it is about −log P / 100, lost by rounding b.
    """
    tiny = torch.finfo(log_student.dtype).tiny
    log_a, log_b = (log / temperature for log in (log_teacher, log_student))
    rest_a, rest_b = (-torch.expm1(log) for log in (log_a, log_b))
    rest_b = rest_b.clamp_min(1e-12)  # a chunk that the student is sure of: its logarithm and quotient are finite
    loss = log_a.exp() * (log_a - log_b) + rest_a * (rest_a.clamp_min(tiny).log() - rest_b.log())
    return loss, (rest_a - rest_b) / rest_b / temperature


def _per_chunk(values: Tensor, chunk: Tensor, count: int) -> Tensor:
    """Sums over the tokens of each chunk, ``[count]``."""
    room = count  # where −1 goes
    return values.new_zeros(count + 1).index_add_(0, torch.where(chunk < 0, room, chunk), values)[:-1]
