"""The loss towards a teacher with another tokenizer: the cells of both vocabularies as one partition.

N the student's supervised tokens, M the teacher's, V_s and V_t the vocabularies, C cells.

Which cells (potstill.alignment.VocabularyCells) and which of the teacher's predictions answers which of the student's tokens
(potstill.alignment.align) is decided before training; here the teacher's distribution over tokens becomes masses of cells:

    root        t_c = Σ q(v) over the teacher's tokens v of cell c
    interior    the student has emitted d pieces of the teacher's token, which goes on: the tokens that begin with these and go on
                stand side by side in ``order``, and each counts for the cell of its piece number d; renormalized over these
    elsewhere   nothing is known: plain cross-entropy

The literature's choices of cells (potstill.baselines.cells) go the same way. Two things differ in them: an interior may keep
the mass of what ends there in a residual cell, and masses may be cut to the heaviest few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from potstill.losses.closed_forms import LossAndGradient
from potstill.losses.fused import DivergenceFunction, as_any_head, as_head, closed_form, fused_linear_loss
from potstill.losses.partitions import Partition, on_support, partition_loss
from potstill.losses.projection import CallableHead, Head, Projection


class Cells(Protocol):
    """What is needed of `potstill.alignment.VocabularyCells`."""

    count: int
    teacher_cells: Tensor
    student_cells: Tensor
    order: Tensor
    keeps_endings: bool
    most: int | None

    def next_cells(self, places: Tensor, depth: int | Tensor) -> Tensor:
        """The cell of piece ``depth`` of the teacher's tokens ``order[places]``; ``count`` for a token that ends there."""
        ...


@dataclass(frozen=True)
class Places:
    """Where each of the student's N supervised tokens finds its target; int64 ``[N]`` each."""

    teacher_row: Tensor
    """Which of the teacher's M hidden states predicts there; −1 for none."""
    start: Tensor
    """The range of ``Cells.order`` that goes on from what the student has emitted of the teacher's token …"""
    stop: Tensor
    depth: Tensor
    """… and how many pieces that is; 0 at a root."""
    cell: Tensor
    """The cell that was seen to happen: that of the teacher's token, or of its next piece."""


class CellPartition:
    """The same cells at every position; ids in none (special tokens, padded rows) share one more, which has no teacher's mass."""

    def __init__(self, cells: Tensor, count: int) -> None:
        self.count = count + 1
        self.cells = cells.masked_fill(cells < 0, count)

    def pool(self, values: Tensor) -> Tensor:
        """``[b, V]`` → ``[b, C + 1]``."""
        # An index that is expanded, not copied, lets torch take its fast path: 0.3 ns an element, index_add takes 0.3 to 100.
        return values.new_zeros(len(values), self.count).scatter_add_(-1, self.cells.expand(len(values), -1), values)

    def spread(self, values: Tensor) -> Tensor:
        """``[b, C + 1]`` → ``[b, V]``."""
        return values.index_select(-1, self.cells)


class ResidualPartition:
    """``cells``, in which those that a row calls ``empty [b, C + 1]`` share that row's last cell."""

    def __init__(self, cells: CellPartition, empty: Tensor) -> None:
        self.cells, self.count = cells, cells.count
        self.empty = empty.clone()
        self.empty[:, -1] = False

    def pool(self, values: Tensor) -> Tensor:
        """``[b, V]`` → ``[b, C + 1]``."""
        pooled = self.cells.pool(values)
        pooled[:, -1] += (pooled * self.empty).sum(-1)
        return pooled.masked_fill_(self.empty, 0)

    def spread(self, values: Tensor) -> Tensor:
        """``[b, C + 1]`` → ``[b, V]``."""
        return self.cells.spread(torch.where(self.empty, values[:, -1:], values))

    def cell_of(self, cells: Tensor) -> Tensor:
        """Where what was one of ``cells`` is now: ``[b]`` → ``[b]``."""
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
    """The divergence over cells and the cross-entropy inside them, summed over tokens: a scalar in nats, for the student.

    ``student_hidden [N, Hs]`` and ``labels [N]`` at the student's supervised tokens, ``teacher_hidden [M, Ht]`` and
    ``teacher_labels [M]`` at the teacher's; heads of V_s and V_t rows. ``teacher_temperature`` is that at which the text was
    sampled. ``within_weight`` is the share of cross-entropy inside the observed cell: 1 has the same expectation as text
    distillation. With one tokenizer for both this is `fused_linear_divergence`, but for special tokens.

    Raises: ValueError if shapes do not fit, or for an unknown divergence. Source: docs/one-principle.md.
    """
    student, teacher = as_head(student_head), as_any_head(teacher_head)
    if labels.shape != student_hidden.shape[:1] or places.teacher_row.shape != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} and places {tuple(places.teacher_row.shape)} must be one for each of the "
            f"{len(student_hidden)} hidden states of the student"
        )
    compare = closed_form(divergence, divergence_parameters)
    if divergence != "forward_kl":  # which needs no support: where the teacher has nothing, q log(q / p) is 0
        compare = on_support(compare)
    target = CellPartition(_fitted(cells.student_cells, len(student)).to(student_hidden.device), cells.count)
    known = places.teacher_row >= 0
    row = places.teacher_row.clamp_min(0)
    if not len(teacher_hidden):  # nothing is known anywhere: one row to point at
        teacher_hidden = teacher_hidden.new_zeros(1, teacher_hidden.shape[-1])
    observed = None if teacher_labels is None or not len(teacher_labels) else teacher_labels[row]
    projection = Projection(teacher_hidden[row], teacher, observed=observed, chunk_tokens=chunk_tokens)
    masses = _Masses(projection, cells, places, teacher_temperature)

    def score(logits: Tensor, rows: slice) -> LossAndGradient:
        (t, says_something), seen = masses(rows), places.cell[rows].clamp_min(0)
        told = known[rows] & says_something
        partition: Partition = target
        if cells.keeps_endings:
            partition = residual = ResidualPartition(target, (t == 0) & (places.depth[rows, None] > 0))
            seen = residual.cell_of(seen)
        return partition_loss(compare, t, logits, partition, labels[rows], seen=seen, known=told, within_weight=within_weight)

    return fused_linear_loss(student_hidden, student, score, observed=labels, chunk_tokens=chunk_tokens)


class _Masses:
    """The teacher's masses on the cells at the student's N positions, asked for a block at a time and in order."""

    def __init__(self, projection: Projection, cells: Cells, places: Places, temperature: float) -> None:
        self.projection, self.cells, self.temperature = projection, cells, temperature
        device = projection.hidden.device
        self.source = CellPartition(_fitted(cells.teacher_cells, len(projection.head)).to(device), cells.count)
        # Which masses go where is worked out on the CPU, where the cells are, and sent to the device once a block.
        self.ranges = torch.stack([places.start, places.stop, places.depth], -1).cpu()
        self.is_inside = ((places.depth > 0) & (places.teacher_row >= 0)).cpu()

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor]:
        """``[b, C + 1]``, each row summing to 1; and whether it does, ``[b]``: a mass that underflowed says nothing."""
        cells = self.cells
        logits = self.projection.logits(rows)
        q = (logits if self.temperature == 1 else logits.div_(self.temperature)).softmax(-1)
        pooled = self.source.pool(q)
        pooled[:, -1] = 0  # what only the teacher can say is no example to the student
        if cells.most is not None and cells.most < cells.count:
            heaviest = pooled.topk(cells.most, -1)
            pooled.zero_().scatter_(-1, heaviest.indices, heaviest.values)
        inside = self.is_inside[rows].nonzero().squeeze(-1)
        if len(inside):
            row, ids, columns = (index.to(q.device) for index in self._going_on(inside, self.ranges[rows][inside]))
            pooled[inside.to(q.device)] = 0
            pooled.index_put_((row, columns), q[row, ids], accumulate=True)
        total = pooled.sum(-1, keepdim=True)
        return pooled / total.clamp_min(torch.finfo(pooled.dtype).tiny), total.squeeze(-1) > 0

    def _going_on(self, inside: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For all rows ``inside`` a word, one after the other: row, a token that goes on there, the cell of its next piece."""
        start, stop, depth = ranges.unbind(-1)
        sizes = stop - start
        within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        places = start.repeat_interleave(sizes) + within
        columns = self.cells.next_cells(places, depth.repeat_interleave(sizes))
        return inside.repeat_interleave(sizes), self.cells.order[places], columns


def _fitted(cells: Tensor, rows: int) -> Tensor:
    """One cell for each row of a head: −1 for rows beyond the tokenizer (padding), and none for tokens beyond the head."""
    if len(cells) >= rows:
        return cells[:rows]
    return torch.cat([cells, cells.new_full((rows - len(cells),), -1)])
