"""Compute a loss from a target that is known only as masses on cells of the vocabulary.

b tokens in a block, N supervised tokens, V the student's vocabulary, C cells. A *partition* divides
the vocabulary into cells. t_c is the teacher's mass on cell c, u the token of the text, o the
observed cell, and the loss is

    D(t ‖ p over cells) − λ·(log p_u − log p_o)          p_c = Σ p over the tokens of cell c

If every token is its own cell, this is logit distillation; with one cell for all tokens, it is text
distillation. In between are k log-probabilities from a server (`fused_linear_topk`) and a teacher
with another tokenizer (cross_tokenizer.py).

D is any divergence of closed_forms.py, over C cells instead of V tokens, with log t and log p_c as
logits. It returns G_c, the gradient with respect to the logit of cell c. Each token of the cell
gets its share p(w|c):

    ∂/∂s_w = p(w|c)·G_c + λ·([c = o]·p(w|c) − [w = u])

For forward KL and λ = 1 this is p − t̃ with the *completed target* t̃(w) = t_c·p(w|c) + [w = u] −
[c = o]·p(w|c). It is the gradient of text distillation, p − [w = u], plus a term whose expectation
is 0 if o is drawn from t. This holds even if o is the cell of the teacher's token and u, in the
student's spelling of it, is in another cell.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from potstill.losses.closed_forms import LOWEST, LossAndGradient, cross_entropy, finite
from potstill.losses.fused import (
    DivergenceFunction,
    as_head,
    closed_form,
    fused_linear_loss,
    with_hard_labels,
)
from potstill.losses.projection import Head


class Partition(Protocol):
    """Assign each token to a cell, for a block of b positions with possibly different cells."""

    count: int

    def pool(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each cell: ``[b, V]`` → ``[b, C]``."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """Give each token the value of its cell: ``[b, C]`` → ``[b, V]``."""
        ...


def partition_loss(
    compare: Callable[[Tensor, Tensor], LossAndGradient],
    masses: Tensor,
    student_logits: Tensor,
    partition: Partition,
    observed: Tensor,
    observed_cells: Tensor,
    *,
    has_target: Tensor | None = None,
    within_weight: float = 1.0,
) -> LossAndGradient:
    """Return the loss ``[b]`` in nats and its gradient ``[b, V]``.

    ``masses [b, C]`` is the teacher's distribution over cells, ``observed [b]`` the tokens of the
    text, ``observed_cells [b]`` the cells o, ``within_weight`` is λ. Where ``has_target [b]`` is
    False, the masses are ignored and the loss is cross-entropy.
    """
    p = student_logits.softmax(-1)
    tiny = torch.finfo(p.dtype).tiny
    pooled = partition.pool(p)
    columns = observed_cells[:, None]
    log_p_observed = p.gather(-1, observed[:, None]).clamp_min(tiny).log()
    log_p_cell = pooled.gather(-1, columns).clamp_min(tiny).log()
    between, gradient = compare(finite(masses.log()), finite(pooled.log()))
    within = within_weight * (log_p_cell - log_p_observed).squeeze(-1)
    factor = gradient.div_(pooled.clamp_min(tiny))
    factor.scatter_add_(-1, columns, within_weight / pooled.gather(-1, columns).clamp_min(tiny))
    loss, weight = between + within, torch.full_like(between, within_weight)
    if has_target is not None:
        loss = torch.where(has_target, loss, -log_p_observed.squeeze(-1))
        factor = torch.where(has_target[:, None], factor, 1.0)
        weight = torch.where(has_target, weight, 1.0)
    gradient = partition.spread(factor).mul_(p)
    return loss, gradient.scatter_add_(-1, observed[:, None], -weight[:, None])


def on_support(
    compare: Callable[[Tensor, Tensor], LossAndGradient],
) -> Callable[[Tensor, Tensor], LossAndGradient]:
    """Return D(t ‖ p given S) − log p(S), where S is the set of cells with t_c > 0.

    For forward KL this equals D. For other divergences it is finite where D may be infinite. D
    compares the cells in S. The token of the text is in S, so −log p(S) is its cross-entropy.
    """

    def restricted(log_masses: Tensor, log_pooled: Tensor) -> LossAndGradient:
        supported = log_masses > LOWEST
        p = log_pooled.exp()
        share = (p * supported).sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        loss, gradient = compare(log_masses, log_pooled.masked_fill(~supported, LOWEST))
        return loss - share.squeeze(-1).log(), gradient + p - p * supported / share

    return restricted


class TopKPartition:
    """Make each of the tokens ``ids [b, k]`` a cell, and all other tokens cell number k.

    A negative id is no token: its cell is empty.
    """

    def __init__(self, ids: Tensor, vocabulary: int) -> None:
        self.count = ids.shape[-1] + 1
        cells = torch.full((len(ids), vocabulary + 1), self.count - 1, device=ids.device)
        numbers = torch.arange(self.count - 1, device=ids.device).expand_as(ids)
        cells.scatter_(-1, ids.where(ids >= 0, vocabulary), numbers)
        self.cells = cells[:, :vocabulary]

    def pool(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each cell: ``[b, V]`` → ``[b, k + 1]``."""
        return values.new_zeros(len(values), self.count).scatter_add_(-1, self.cells, values)

    def spread(self, values: Tensor) -> Tensor:
        """Give each token the value of its cell: ``[b, k + 1]`` → ``[b, V]``."""
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
    hard_label_weight: float = 0.0,
    smallest_rest: float = 0.0,
    chunk_tokens: int | None = None,
    **divergence_parameters: float,
) -> Tensor:
    """Return the loss towards k teacher log-probabilities per token, summed: a scalar in nats.

    ``ids [N, k]`` are distinct tokens, ``log_probabilities [N, k]`` the teacher's, ``labels [N]``
    the tokens of the text. A negative id is no token; its log-probability must be −inf. The
    remaining mass is one cell, in which the loss is cross-entropy. If the text was sampled from the
    teacher, the expected gradient is that of the whole distribution; dropping the rest or
    renormalizing would be biased. k = V is the whole distribution.

    ``hard_label_weight`` of cross-entropy on the text is mixed in. A label beyond the student's
    head has no cross-entropy. ``smallest_rest`` is the least mass of the remaining tokens, if there
    are any: log-probabilities that were rounded may sum to 1, and reverse KL would be infinite.

    Raises: ValueError if shapes do not fit, for an unknown divergence, or if the probabilities of a
    token sum to more than 1.
    """
    head = as_head(student_head)
    _check_shapes(student_hidden, ids, log_probabilities, labels)
    masses = _masses(log_probabilities, ids, len(head), smallest_rest)
    compare = closed_form(divergence, divergence_parameters)
    shared = labels < len(head)
    # The loss within the cell of a kept token is 0: the choice for a label that is not shared.
    text = labels.where(shared, ids.amax(-1).clamp_min(0) if ids.shape[-1] else 0)

    def score(logits: Tensor, positions: slice) -> LossAndGradient:
        partition, observed = TopKPartition(ids[positions], len(head)), text[positions]
        cells = partition.cells.gather(-1, observed[:, None]).squeeze(-1)
        hard = cross_entropy(observed, logits.clone()) if hard_label_weight else None
        loss = functools.partial(partition_loss, compare, masses[positions], logits, partition)
        soft = loss(observed, cells, within_weight=within_weight)
        if hard is None:
            return soft
        return with_hard_labels(soft, hard, hard_label_weight * shared[positions].to(masses.dtype))

    return fused_linear_loss(
        student_hidden, head, score, observed=labels, chunk_tokens=chunk_tokens
    )


def _masses(log_probabilities: Tensor, ids: Tensor, rows: int, smallest_rest: float) -> Tensor:
    """Return the masses of the k tokens and of the rest, ``[N, k + 1]``. Raises: ValueError."""
    kept = log_probabilities.to(torch.promote_types(log_probabilities.dtype, torch.float32)).exp()
    rest = 1 - kept.sum(-1, keepdim=True)
    if bool((rest < -1e-3).any()):
        raise ValueError(
            "log_probabilities: the probabilities at a position sum to more than 1; give the "
            "teacher's own log-probabilities, not renormalized ones"
        )
    is_whole = (ids >= 0).sum(-1, keepdim=True) == rows  # the rest is only rounding error
    return torch.cat([kept, rest.clamp_min(smallest_rest).masked_fill(is_whole, 0)], -1)


def _check_shapes(hidden: Tensor, ids: Tensor, log_probabilities: Tensor, labels: Tensor) -> None:
    n = hidden.shape[:1]
    if ids.shape != log_probabilities.shape or ids.shape[:1] != n or labels.shape != n:
        raise ValueError(
            f"ids {tuple(ids.shape)}, log_probabilities {tuple(log_probabilities.shape)} and "
            f"labels {tuple(labels.shape)}: need [N, k], [N, k] and [N] with "
            f"N = {len(hidden)} hidden states"
        )
