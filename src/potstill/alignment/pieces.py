"""Give every student token its own cell; a teacher token predicts its next piece.

V_s: number of student ids. seg(v): the student's tokens for the bytes of teacher token v. d: number
of these already emitted.

    t(w) ∝ Σ q(v) over the teacher tokens that continue and have w as piece number d

The student usually writes v as seg(v). Then t is its exact target, without sampling noise. If it
writes v otherwise (it has one token " docstring", the teacher has " doc" and "string"), the text
has u where t counted w′ = seg(v)[d]. The gradient is corrected by that difference,

    p − t − [u] + [w′]

Its expectation equals that of text distillation, because t is the expectation of [w′] over the
teacher's next token.
"""

from __future__ import annotations

from potstill.alignment.cells import VocabularyCells, own_cells


class PieceCells(VocabularyCells):
    """`VocabularyCells` with one student token in each cell."""

    def __init__(self, base: VocabularyCells) -> None:
        self._build(base.segmentation, own_cells(base.student_cells))
