"""Every student token is a cell, and each teacher token speaks of the next piece of its own spelling.

V_s the student's ids. seg(v): the student's tokens for the bytes of teacher token v; d: how many of them it has already emitted.

    t(w) ∝ Σ q(v) over the teacher's tokens that go on and have w as piece number d

Nearly always the student writes v as seg(v), and then t is what it should learn: no token of the text is needed, and no sampling
noise is left. Now and then it spells otherwise (" docstring" over " doc" and "string"). There the text says u where t counted
w′ = seg(v)[d], and the gradient is corrected by just that difference,

    p − t − [u] + [w′]

whose expectation is that of text distillation, because t is the expectation of [w′] over the teacher's next token.
"""

from __future__ import annotations

from potstill.alignment.cells import VocabularyCells, own_cells


class PieceCells(VocabularyCells):
    """`VocabularyCells` in which no two student tokens share a cell; what was seen is the next piece of the teacher's token."""

    def __init__(self, base: VocabularyCells) -> None:
        self._settle(base.segmentation, own_cells(base.student_cells))
