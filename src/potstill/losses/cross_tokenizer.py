"""Compute the loss from a teacher with another tokenizer, over cells of both vocabularies.

N supervised tokens of the student, M of the teacher, V_s and V_t vocabularies, C cells.

The cells (potstill.alignment.VocabularyCells) and the teacher prediction for each student token
(potstill.alignment.align) are computed before training. Here the teacher's distribution over tokens
becomes masses on cells:

    root      t_c = Σ q(v) over the teacher tokens v of cell c
    interior  the student has emitted d pieces of a teacher token: sum over the tokens of
              ``order[start:stop]`` by the cell of their piece number d, and renormalize
    other     no target: plain cross-entropy

The baselines (potstill.baselines.cells) use the same code with two options: a residual cell for the
mass of tokens that end at an interior, and only the few cells with most mass at a position.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from potstill.losses.closed_forms import LossAndGradient
from potstill.losses.fused import (
    DivergenceFunction,
    as_any_head,
    as_head,
    closed_form,
    fused_linear_loss,
)
from potstill.losses.partitions import Partition, on_support, partition_loss
from potstill.losses.projection import CallableHead, Head, Projection


class Cells(Protocol):
    """Declare the part of `potstill.alignment.VocabularyCells` that the loss uses."""

    count: int
    teacher_cells: Tensor
    student_cells: Tensor
    order: Tensor
    keeps_endings: bool
    most: int | None

    def next_cells(self, places: Tensor, depth: int | Tensor) -> Tensor:
        """Return the cell of piece ``depth`` of ``order[places]``; ``count`` if the token ends."""
        ...


@dataclass(frozen=True)
class Places:
    """Locate the target of each of the student's N supervised tokens; each field is int64 [N]."""

    teacher_row: Tensor
    """Index of the teacher's hidden state, of M, that predicts here; −1 for none."""
    start: Tensor
    """The tokens that continue the emitted pieces are ``Cells.order[start:stop]``."""
    stop: Tensor
    depth: Tensor
    """Number of pieces of the teacher's token already emitted; 0 at a root."""
    cell: Tensor
    """The observed cell: that of the teacher's token, or of its next piece."""


class CellPartition:
    """Use the same cells at every position, and one more cell, without target, for other ids."""

    def __init__(self, cells: Tensor, count: int) -> None:
        self.count = count + 1
        self.cells = cells.masked_fill(cells < 0, count)

    def pool(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each cell: ``[b, V]`` → ``[b, C + 1]``."""
        # An expanded index uses a fast path: 0.3 ns per element; index_add takes up to 100 ns.
        index = self.cells.expand(len(values), -1)
        return values.new_zeros(len(values), self.count).scatter_add_(-1, index, values)

    def spread(self, values: Tensor) -> Tensor:
        """Give each token the value of its cell: ``[b, C + 1]`` → ``[b, V]``."""
        return values.index_select(-1, self.cells)


class ResidualPartition:
    """Merge, at each position, the cells marked in ``empty [b, C + 1]`` into the last cell."""

    def __init__(self, cells: CellPartition, empty: Tensor) -> None:
        self.cells, self.count = cells, cells.count
        self.empty = empty.clone()
        self.empty[:, -1] = False

    def pool(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each cell: ``[b, V]`` → ``[b, C + 1]``."""
        pooled = self.cells.pool(values)
        pooled[:, -1] += (pooled * self.empty).sum(-1)
        return pooled.masked_fill_(self.empty, 0)

    def spread(self, values: Tensor) -> Tensor:
        """Give each token the value of its cell: ``[b, C + 1]`` → ``[b, V]``."""
        return self.cells.spread(torch.where(self.empty, values[:, -1:], values))

    def cell_of(self, cells: Tensor) -> Tensor:
        """Return the number of each cell after merging: ``[b]`` → ``[b]``."""
        return torch.where(self.empty.gather(-1, cells[:, None]).squeeze(-1), self.count - 1, cells)


def fused_linear_cells(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | CallableHead,
    *,
    cells: Cells,
    places: Places,
    labels: Tensor,
    teacher_labels: Tensor | None = None,
    divergence: str | DivergenceFunction = "forward_kl",
    teacher_temperature: float = 1.0,
    within_weight: float = 1.0,
    chunk_tokens: int | None = None,
    **divergence_parameters: float,
) -> Tensor:
    """Return divergence over cells plus cross-entropy inside them, summed: a scalar in nats.

    ``student_hidden [N, Hs]``, ``labels [N]``, ``teacher_hidden [M, Ht]``, ``teacher_labels [M]``;
    heads of V_s and V_t rows. ``teacher_temperature`` is the sampling temperature of the text.
    ``within_weight`` multiplies the cross-entropy in a cell: at 1 the mean gradient is that of text
    distillation. Without a target, a token gets cross-entropy. With equal tokenizers this is
    `fused_linear_divergence`, except for special tokens.
    Raises: ValueError for wrong shapes or an unknown divergence. Source: docs/one-principle.md.
    """
    student = as_head(student_head)
    _check_places(student_hidden, labels, places)
    compare = closed_form(divergence, divergence_parameters)
    if divergence != "forward_kl":  # forward KL adds 0 where the teacher has no mass
        compare = on_support(compare)
    student_cells = _one_per_row(cells.student_cells, len(student)).to(student_hidden.device)
    all_cells = CellPartition(student_cells, cells.count)
    row = places.teacher_row
    projection = teacher_projection(teacher_hidden, teacher_head, row, teacher_labels, chunk_tokens)
    masses = _TeacherMasses(projection, cells, places, teacher_temperature)

    def score(logits: Tensor, positions: slice) -> LossAndGradient:
        partition: Partition = all_cells
        (t, has_mass), observed_cells = masses(positions), places.cell[positions].clamp_min(0)
        if cells.keeps_endings:
            empty = (t == 0) & (places.depth[positions, None] > 0)
            partition = residual = ResidualPartition(all_cells, empty)
            observed_cells = residual.cell_of(observed_cells)
        has_target = (row[positions] >= 0) & has_mass
        loss = functools.partial(partition_loss, compare, t, logits, partition, labels[positions])
        return loss(observed_cells, has_target=has_target, within_weight=within_weight)

    return fused_linear_loss(
        student_hidden, student, score, observed=labels, chunk_tokens=chunk_tokens
    )


def teacher_projection(
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | CallableHead,
    teacher_row: Tensor,
    teacher_labels: Tensor | None,
    chunk_tokens: int | None,
) -> Projection:
    """Return the teacher's logits at the student's positions, ``teacher_row [N]`` of M states.

    Positions without a prediction (−1) get the logits of row 0, which the caller must ignore.
    """
    row = teacher_row.clamp_min(0)
    if not len(teacher_hidden):  # every position is −1; the index needs a row
        teacher_hidden = teacher_hidden.new_zeros(1, teacher_hidden.shape[-1])
    observed = None if teacher_labels is None or not len(teacher_labels) else teacher_labels[row]
    head = as_any_head(teacher_head)
    return Projection(teacher_hidden[row], head, observed=observed, chunk_tokens=chunk_tokens)


class _TeacherMasses:
    """Compute the teacher's masses on the cells, block by block in increasing order."""

    def __init__(
        self, projection: Projection, cells: Cells, places: Places, temperature: float
    ) -> None:
        self.projection, self.cells, self.temperature = projection, cells, temperature
        device = projection.hidden.device
        teacher_cells = _one_per_row(cells.teacher_cells, len(projection.head)).to(device)
        self.partition = CellPartition(teacher_cells, cells.count)
        # The cells are on the CPU, so indices are computed there and copied once per block.
        self.ranges = torch.stack([places.start, places.stop, places.depth], -1).cpu()
        self.is_inside = ((places.depth > 0) & (places.teacher_row >= 0)).cpu()

    def __call__(self, positions: slice) -> tuple[Tensor, Tensor]:
        """Return masses ``[b, C + 1]`` and ``has_mass [b]``: False if the sum underflows."""
        cells = self.cells
        logits = self.projection.logits(positions)
        q = (logits if self.temperature == 1 else logits.div_(self.temperature)).softmax(-1)
        pooled = self.partition.pool(q)
        pooled[:, -1] = 0  # the student cannot produce tokens that have no cell
        if cells.most is not None and cells.most < cells.count:
            heaviest = pooled.topk(cells.most, -1)
            pooled.zero_().scatter_(-1, heaviest.indices, heaviest.values)
        inside = self.is_inside[positions].nonzero().squeeze(-1)
        if len(inside):
            indices = self._continuations(inside, self.ranges[positions][inside])
            position, ids, next_cells = (index.to(q.device) for index in indices)
            pooled[inside.to(q.device)] = 0
            pooled.index_put_((position, next_cells), q[position, ids], accumulate=True)
        total = pooled.sum(-1, keepdim=True)
        return pooled / total.clamp_min(torch.finfo(pooled.dtype).tiny), total.squeeze(-1) > 0

    def _continuations(self, inside: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for every token that continues: position, token id, cell of its next piece."""
        start, stop, depth = ranges.unbind(-1)
        sizes = stop - start
        begins = sizes.cumsum(0) - sizes
        places = torch.arange(int(sizes.sum())) + (start - begins).repeat_interleave(sizes)
        next_cells = self.cells.next_cells(places, depth.repeat_interleave(sizes))
        return inside.repeat_interleave(sizes), self.cells.order[places], next_cells


def _check_places(hidden: Tensor, labels: Tensor, places: Places) -> None:
    if labels.shape != hidden.shape[:1] or places.teacher_row.shape != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} and places {tuple(places.teacher_row.shape)} must be "
            f"one for each of the {len(hidden)} hidden states of the student"
        )


def _one_per_row(cells: Tensor, vocabulary_rows: int) -> Tensor:
    """Return one cell for each head row: −1 for padding; tokens beyond the head are cut off."""
    if len(cells) >= vocabulary_rows:
        return cells[:vocabulary_rows]
    return torch.cat([cells, cells.new_full((vocabulary_rows - len(cells),), -1)])
