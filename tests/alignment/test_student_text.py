"""Targets on the student's own text: what the teacher would write after the same bytes."""

from __future__ import annotations

import torch

from alignment.toys import sentencepiece
from conftest import toy_tokenizer
from potstill.alignment import StudentTextCells, VocabularyCells

TEACHER, STUDENT = toy_tokenizer(), sentencepiece(prepend="first")


def test_a_teacher_token_that_ends_keeps_its_mass() -> None:
    base = VocabularyCells(TEACHER, STUDENT)
    cells = StudentTextCells(base)
    longest = max(range(len(base.segmentation)), key=lambda v: len(base.segmentation[v]))
    pieces = base.segmentation[longest]
    assert len(pieces) > 1
    ended = base.segmentation.index(pieces[:1])
    q = torch.zeros(len(base.segmentation))
    q[longest], q[ended] = 0.25, 0.75
    assert cells.target(q, pieces[:1])[-1] == 0.75  # in the residual cell
    assert base.target(q, pieces[:1]).max() == 1  # on the teacher's text it did not end


def test_a_spanning_token_is_in_the_cell_of_its_first_piece() -> None:
    base = VocabularyCells(TEACHER, STUDENT)
    cells = StudentTextCells(base)
    assert torch.equal(cells.student_cells, base.student_cells)
    assert cells.count == base.count
