"""One principle: how much of the loss is known.

b tokens in a block, N supervised tokens, V the student's vocabulary, C cells. A *partition* cuts the vocabulary into cells. The
teacher's mass t_c on each cell is known, a token u was written, cell c(u) was seen to happen, and the loss is

    D(t ‖ p over cells) − λ·(log p_u − log p_c(u))          p_c = Σ p over the tokens of cell c

With every token its own cell it is logit distillation, with one cell for all it is text distillation, and between the two lie
a server that keeps k log-probabilities (`fused_linear_topk`) and a teacher with another tokenizer (cross_tokenizer.py).

Nothing new has to be derived. D is any divergence of closed_forms.py over C symbols instead of V, log t and log p_c its logits. It
gives G_c, the gradient with respect to cell c's logit, and within a cell the softmax hands it on in proportion:

    ∂/∂s_w = p(w|c)·G_c + λ·([c = c(u)]·p(w|c) − [w = u])

For forward KL and λ = 1 that is p − t̃, where t̃(w) = t_c·p(w|c) + [w = u] − [c = c(u)]·p(w|c) is the *completed target*: the
gradient of text, p − [w = u], and beside it something whose mean is nought when c(u) is drawn from t. So the mean is that of text
distillation, even where c(u) is the cell of what the teacher said and u, in the student's spelling of it, lies in another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from potstill.losses.closed_forms import LOWEST, LossAndGradient, finite
from potstill.losses.fused import DivergenceFunction, as_head, closed_form, fused_linear_loss
from potstill.losses.projection import Head


class Partition(Protocol):
    """Which token is in which cell, for a block of b positions that need not all be cut alike."""

    count: int

    def pool(self, values: Tensor) -> Tensor:
        """Sums over cells: ``[b, V]`` → ``[b, C]``."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """Each token gets what its cell has: ``[b, C]`` → ``[b, V]``."""
        ...


def partition_loss(
    compare: Callable[[Tensor, Tensor], LossAndGradient],
    masses: Tensor,
    student_logits: Tensor,
    partition: Partition,
    observed: Tensor,
    *,
    seen: Tensor,
    known: Tensor | None = None,
    within_weight: float = 1.0,
) -> LossAndGradient:
    """Loss ``[b]`` in nats and its gradient ``[b, V]``.

    ``masses [b, C]`` is the teacher's distribution over cells, ``observed [b]`` the tokens that the text has, ``seen [b]`` the
    cells that happened. Where ``known [b]`` is False nothing is known of the teacher: plain cross-entropy. ``within_weight`` is λ.
    """
    p = student_logits.softmax(-1)
    tiny = torch.finfo(p.dtype).tiny
    pooled = partition.pool(p)
    own = seen[:, None]
    log_of_observed = p.gather(-1, observed[:, None]).clamp_min(tiny).log()
    log_of_own = pooled.gather(-1, own).clamp_min(tiny).log()
    between, gradient = compare(finite(masses.log()), finite(pooled.log()))
    within = within_weight * (log_of_own - log_of_observed).squeeze(-1)
    factor = gradient.div_(pooled.clamp_min(tiny))
    factor.scatter_add_(-1, own, within_weight / pooled.gather(-1, own).clamp_min(tiny))
    loss, weight = between + within, torch.full_like(between, within_weight)
    if known is not None:
        loss = torch.where(known, loss, -log_of_observed.squeeze(-1))
        factor = torch.where(known[:, None], factor, 1.0)
        weight = torch.where(known, weight, 1.0)
    gradient = partition.spread(factor).mul_(p)
    return loss, gradient.scatter_add_(-1, observed[:, None], -weight[:, None])


def on_support(
    compare: Callable[[Tensor, Tensor], LossAndGradient],
) -> Callable[[Tensor, Tensor], LossAndGradient]:
    """D(t ‖ p over the cells that t has any mass on) − log p(those cells): for forward KL the same as D, for others finite.

    That the text stays on the teacher's support was seen, so it is learned as all that is seen: by cross-entropy. Inside, D
    compares what is known.
    """

    def restricted(log_masses: Tensor, log_pooled: Tensor) -> LossAndGradient:
        supported = log_masses > LOWEST
        p = log_pooled.exp()
        share = (p * supported).sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        loss, gradient = compare(log_masses, log_pooled.masked_fill(~supported, LOWEST))
        return loss - share.squeeze(-1).log(), gradient + p - p * supported / share

    return restricted


class TopKPartition:
    """k tokens a row are their own cells, ``ids [b, k]``; the rest is the last cell, number k."""

    def __init__(self, ids: Tensor, vocabulary: int) -> None:
        self.count = ids.shape[-1] + 1
        self.cells = torch.full((len(ids), vocabulary), self.count - 1, device=ids.device)
        self.cells.scatter_(-1, ids, torch.arange(self.count - 1, device=ids.device).expand_as(ids))

    def pool(self, values: Tensor) -> Tensor:
        """``[b, V]`` → ``[b, k + 1]``."""
        return values.new_zeros(len(values), self.count).scatter_add_(-1, self.cells, values)

    def spread(self, values: Tensor) -> Tensor:
        """``[b, k + 1]`` → ``[b, V]``."""
        return values.gather(-1, self.cells)


def fused_linear_topk(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    ids: Tensor,
    log_probabilities: Tensor,
    labels: Tensor,
    *,
    divergence: str | DivergenceFunction = "forward_kl",
    within_weight: float = 1.0,
    chunk_tokens: int | None = None,
    **divergence_parameters: float,
) -> Tensor:
    """The loss towards a teacher of whom k log-probabilities a token are kept, summed over tokens: a scalar in nats.

    ``ids [N, k]`` are distinct tokens, ``log_probabilities [N, k]`` the teacher's, ``labels [N]`` the tokens that the text has.
    What the k leave over is one cell's mass, and inside it the text decides: when the text was sampled from the teacher, the mean
    gradient is that of its whole distribution, which cutting off or renormalizing the k would not give. k = V is all of it.

    Raises: ValueError if shapes do not fit, as `potstill.losses.fused_linear_divergence` does, or if probabilities exceed 1 in sum.
    """
    if (
        ids.shape != log_probabilities.shape
        or ids.shape[:1] != student_hidden.shape[:1]
        or labels.shape != ids.shape[:1]
    ):
        raise ValueError(
            f"ids {tuple(ids.shape)}, log_probabilities {tuple(log_probabilities.shape)} and labels {tuple(labels.shape)} must be "
            f"[N, k], [N, k] and [N] for the {len(student_hidden)} hidden states"
        )
    head = as_head(student_head)
    kept = log_probabilities.to(torch.promote_types(log_probabilities.dtype, torch.float32)).exp()
    rest = 1 - kept.sum(-1, keepdim=True)
    if bool((rest < -1e-3).any()):
        raise ValueError(
            "log_probabilities: their exponentials exceed 1 in sum; give the teacher's own, not renormalized logits"
        )
    if ids.shape[-1] == len(head):  # nothing is left over but rounding
        rest = torch.zeros_like(rest)
    masses = torch.cat([kept, rest.clamp_min(0)], -1)
    compare = closed_form(divergence, divergence_parameters)

    def score(logits: Tensor, rows: slice) -> LossAndGradient:
        partition = TopKPartition(ids[rows], len(head))
        seen = partition.cells.gather(-1, labels[rows, None]).squeeze(-1)
        return partition_loss(
            compare,
            masses[rows],
            logits,
            partition,
            labels[rows],
            seen=seen,
            within_weight=within_weight,
        )

    return fused_linear_loss(
        student_hidden, head, score, observed=labels, chunk_tokens=chunk_tokens
    )
