"""Cells for text that the student wrote (on-policy), where no token of the text is the teacher's.

The targets of `VocabularyCells` and `PieceCells` use that the teacher sampled the text: a token
that continues in the text did continue, and a student token that spans two of the teacher's stands
for both. In the student's own text neither is evidence of what the teacher would write:

    interior   teacher tokens that end there keep their mass, in one residual cell: the student
               chose to continue
    spanning   " docstring" is in the cell of its first piece " doc", whose mass the teacher gives;
               the loss does not say how the student divides it
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from potstill.alignment.cells import VocabularyCells


class StudentTextCells(VocabularyCells):
    """`VocabularyCells` in which a teacher token that ends at an interior keeps its mass."""

    keeps_endings = True

    def __init__(self, base: VocabularyCells) -> None:
        self._build(base.segmentation, self._cells(base.student_cells))
        self._lengths = torch.tensor([len(pieces) for pieces in self._sorted])

    def _cells(self, student_cells: Tensor) -> Tensor:
        """Return the cell of each student id, given those of the base."""
        return student_cells

    def seen(self, teacher_token: int, emitted: tuple[int, ...], token: int) -> int | None:
        """Return the cell of ``token`` itself."""
        return self.student_cell(token)

    def prefix_range(self, emitted: tuple[int, ...] = ()) -> tuple[int, int]:
        """Return the range of ``order`` that starts with ``emitted``; tokens that end are first."""
        start, stop = super().prefix_range(emitted)
        return (bisect_left(self._sorted, emitted), stop) if emitted else (start, stop)

    def next_cells(self, places: Tensor, depth: int | Tensor) -> Tensor:
        """Return the next cell of each token ``[k]``; ``count`` for tokens that end."""
        ended = self._lengths[places] <= depth
        piece = (self.first_piece[places] + depth).masked_fill(ended, 0)
        return self.piece_cells[piece].masked_fill(ended, self.count)

    def target(self, teacher_probs: Tensor, emitted: tuple[int, ...] = ()) -> Tensor:
        """Return the target ``[count + 1]``; the last entry is for tokens that end."""
        mass = teacher_probs.new_zeros(self.count + 1)
        ids = (self.teacher_cells >= 0).nonzero().flatten()
        cells = self.teacher_cells[ids]
        if emitted:
            places = torch.arange(*self.prefix_range(emitted))
            ids, cells = self.order[places], self.next_cells(places, self.depth(emitted))
        mass.index_add_(0, cells, teacher_probs[ids])
        return mass / mass.sum()
