"""Sparse targets: a few tokens of a teacher's distribution, drawn so that the gradient is unbiased.

N supervised tokens, V vocabulary, E entries of all tokens together.

Forward KL's gradient with respect to the student's logits is p − q, linear in the teacher's
probabilities q. A sparse t with E[t] = q therefore gives an unbiased gradient; its noise is the sum
of the variances of t. Other divergences are not linear in q and would be biased.

*Threshold sampling.* Tokens with q ≥ τ keep their own probability. From the others, of mass R,
m = max(1, round(R/τ)) are drawn without replacement with inclusion probabilities m·q/R (systematic
sampling: one uniform number a position), and each gets the mass R/m. Then E[t] = q, Σt = 1, and no
unbiased target of the same expected size has less variance.
Source: Duffield, Lund and Thorup 2007, Priority Sampling; Horvitz and Thompson 1952.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.losses.closed_forms import LossAndGradient
from potstill.losses.fused import as_head, fused_linear_loss
from potstill.losses.projection import Head


@dataclass(frozen=True)
class SparseDistributions:
    """Distributions of N positions with few tokens each, one after the other."""

    ids: Tensor
    """Tokens ``[E]``."""
    masses: Tensor
    """Their masses ``[E]``; those of a position sum to 1."""
    counts: Tensor
    """Entries of each position ``[N]``."""
    large: Tensor
    """How many of them, the first ones, have at least the threshold ``[N]``."""

    def starts(self) -> Tensor:
        """Return the first entry of each position, and E at the end: ``[N + 1]``."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])


def threshold_sample(
    probabilities: Tensor, threshold: float, uniform: Tensor
) -> SparseDistributions:
    """Draw a sparse target for each row of ``probabilities [N, V]``, in float64.

    ``uniform [N]`` are numbers in [0, 1), one a position. Entries with their own probability come
    first, the largest first. Raises: ValueError for a threshold outside (0, 1).

    >>> q = torch.tensor([[0.6, 0.3, 0.06, 0.04]])
    >>> drawn = threshold_sample(q, 0.1, torch.tensor([0.9]))
    >>> drawn.ids.tolist(), [round(mass, 2) for mass in drawn.masses.tolist()]
    ([0, 1, 3], [0.6, 0.3, 0.1])
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold}: must be between 0 and 1")
    q, ids = probabilities.double().sort(-1, descending=True)
    q = q / q.sum(-1, keepdim=True)
    position = torch.arange(q.shape[-1], device=q.device)
    count = (q >= threshold).sum(-1, keepdim=True)
    tail = 1 - torch.where(position < count, q, 0).sum(-1, keepdim=True)
    draws = (tail / threshold).round().clamp_min(1)
    # A token of the tail with more than R/m would be drawn with a probability above 1: keep it.
    while bool((larger := (q * draws > tail * (1 + 1e-12)) & (position >= count)).any()):
        count = count + larger.sum(-1, keepdim=True)
        tail = 1 - torch.where(position < count, q, 0).sum(-1, keepdim=True)
        draws = (tail / threshold).round().clamp_min(1)
    tail_masses = torch.where(position < count, 0, q)
    tail = tail_masses.sum(-1, keepdim=True)
    draws = torch.where(tail > 0, draws, 0)
    number = torch.arange(int(draws.max()), device=q.device)
    points = (number + uniform.double()[:, None].to(q.device)) * (tail / draws.clamp_min(1))
    # The last token of the tail with a mass ends at R: rounding must not step over it.
    found = torch.searchsorted(tail_masses.cumsum(-1), points, right=True)
    last = (q > 0).sum(-1, keepdim=True) - 1
    found = torch.minimum(torch.maximum(found, count), last)
    kept = position[None, : int(count.max())].expand(len(q), -1)
    columns = torch.cat([kept, found], -1)
    chosen = torch.cat([kept < count, number < draws], -1)
    masses = torch.cat([q.gather(-1, kept), (tail / draws.clamp_min(1)).expand_as(found)], -1)
    return SparseDistributions(
        ids.gather(-1, columns)[chosen],
        masses[chosen],
        (count + draws.long()).squeeze(-1),
        count.squeeze(-1),
    )


def fused_linear_sparse(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    target: SparseDistributions,
    entropy: Tensor,
    *,
    labels: Tensor,
    hard_label_weight: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return Σ (−Σ t log p − H(q)), an unbiased estimate of forward KL: a scalar in nats.

    ``entropy [N]`` is the teacher's, in nats. ``labels [N]`` are the tokens of the text;
    ``hard_label_weight`` of cross-entropy on them is mixed in. Tokens beyond the student's head
    have no probability there: their mass goes to the others.
    Raises: ValueError if shapes do not fit.
    """
    head = as_head(student_head)
    if not len(student_hidden) == len(target.counts) == len(entropy) == len(labels):
        raise ValueError(
            f"{len(student_hidden)} hidden states, {len(target.counts)} targets, {len(entropy)} "
            f"entropies and {len(labels)} labels: these numbers must be equal"
        )
    starts = target.starts().tolist()
    owner = torch.repeat_interleave(target.counts)
    masses = _within(target, owner, len(head))

    def score(logits: Tensor, positions: slice) -> LossAndGradient:
        entries = slice(starts[positions.start], starts[positions.stop])
        rows, ids = owner[entries] - positions.start, target.ids[entries]
        mass = masses[entries].to(logits.dtype)
        ids = ids.where(mass != 0, 0)
        log_normalizer = logits.logsumexp(-1)
        seen = logits.new_zeros(len(logits)).index_add_(0, rows, mass * logits[rows, ids])
        soft = log_normalizer - seen - entropy[positions].to(logits.dtype)
        observed = labels[positions]
        share = hard_label_weight * (observed < len(head)).to(logits.dtype)
        observed = observed.where(observed < len(head), 0)
        hard = log_normalizer - logits.gather(-1, observed[:, None]).squeeze(-1)
        gradient = torch.exp(logits - log_normalizer[:, None])
        gradient.index_put_((rows, ids), -mass * (1 - share[rows]), accumulate=True)
        gradient.scatter_add_(-1, observed[:, None], -share[:, None])
        return torch.lerp(soft, hard, share), gradient

    return fused_linear_loss(
        student_hidden, head, score, observed=labels, chunk_tokens=chunk_tokens
    )


def _within(target: SparseDistributions, owner: Tensor, rows: int) -> Tensor:
    """Return the masses ``[E]`` of a vocabulary cut to its first rows, with sum 1 again."""
    inside = target.ids < rows
    if bool(inside.all()):
        return target.masses
    masses = target.masses * inside
    totals = masses.new_zeros(len(target.counts)).index_add_(0, owner, masses)
    return masses / totals.clamp_min(1e-6)[owner]
