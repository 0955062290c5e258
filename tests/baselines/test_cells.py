"""Compare the cells of methods from the literature with their definitions, by enumeration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignment.test_cells import PAIRS
from alignment.toys import letters
from potstill.alignment import VocabularyCells, align, token_bytes
from potstill.baselines import BytePrefixCells, PushForwardCells, StrictCells

pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def probabilities(cells: VocabularyCells) -> torch.Tensor:
    generator, size = torch.Generator().manual_seed(0), len(cells.teacher_cells)
    return torch.rand(size, dtype=torch.float64, generator=generator).softmax(0)


@pairs
def test_push_forward_moves_mass_to_the_next_piece_and_keeps_tokens_that_end(
    pair: tuple[Any, Any],
) -> None:
    base = VocabularyCells(*pair)
    cells, q = PushForwardCells(base), probabilities(base)
    for emitted in {pieces[:d] for pieces in base.segmentation for d in range(len(pieces))}:
        expected = torch.zeros(cells.count + 1, dtype=torch.float64)
        for v, pieces in enumerate(base.segmentation):
            if pieces and pieces[: len(emitted)] == emitted:
                continues = len(pieces) > len(emitted)
                expected[int(cells.student_cells[pieces[len(emitted)]]) if continues else -1] += q[
                    v
                ]
        torch.testing.assert_close(
            cells.target(q, emitted), expected / expected.sum(), rtol=0, atol=1e-12
        )


@pairs
def test_byte_prefixes_move_mass_to_the_longest_token_that_starts_the_rest(
    pair: tuple[Any, Any],
) -> None:
    base, (teacher, student) = VocabularyCells(*pair), map(token_bytes, pair)
    cells, q = BytePrefixCells(base, teacher, student), probabilities(base)
    for emitted in {pieces[:d] for pieces in base.segmentation for d in range(len(pieces))}:
        written = b"".join(student[u] or b"" for u in emitted)
        expected = torch.zeros(cells.count + 1, dtype=torch.float64)
        for v, string in enumerate(teacher):
            if string is None and base.teacher_cells[v] >= 0 and not emitted:
                expected[int(cells.student_cells[base.segmentation[v][0]])] += q[v]
            elif string is not None and string.startswith(written):
                rest = string[len(written) :]
                prefixes = (u for u in student if u and rest.startswith(u))
                longest = max(prefixes, key=len, default=None)
                ids = [u for u, found in enumerate(student) if found == longest and longest]
                chosen = [u for u in ids if (u,) in base.segmentation] or ids
                expected[int(cells.student_cells[chosen[0]]) if ids else -1] += q[v]
        torch.testing.assert_close(
            cells.target(q, emitted), expected / expected.sum(), rtol=0, atol=1e-12
        )


@pairs
def test_strict_cells_are_the_tokens_with_equal_bytes(pair: tuple[Any, Any]) -> None:
    base, (teacher, student) = VocabularyCells(*pair), map(token_bytes, pair)
    cells = StrictCells(base)
    for v, string in enumerate(teacher):
        if string is not None:
            assert (cells.teacher_cells[v] >= 0) == (string in student)
            if string in student:
                (u,) = cells.segmentation[v]
                assert student[u] == string
                assert cells.student_cells[u] == cells.teacher_cells[v]
    count = int((cells.student_cells >= 0).sum())
    assert int(cells.student_cells.max()) + 1 == cells.count == count


def positions(
    cells: VocabularyCells, pair: tuple[Any, Any], text: str
) -> list[tuple[bytes | None, bool]]:
    """Return each student token of a text, and True if it has a target."""
    strings = [token_bytes(tokenizer) for tokenizer in pair]
    ids = [tokenizer.encode(text) for tokenizer in pair]
    masks = [[True] * len(one) for one in ids]
    found = align(
        ids[0],
        masks[0],
        ids[1],
        masks[1],
        cells=cells,
        teacher_tokens=strings[0],
        student_tokens=strings[1],
    )
    assert found is not None
    return [(strings[1][u], k >= 0) for u, k in zip(ids[1], found.teacher_index, strict=True)]


def test_a_token_across_a_teacher_boundary_has_target_zero_under_push_forward_only() -> None:
    pair = (
        letters("abc", "a b"),
        letters("abc", "a b", "ab c"),
    )  # "abc" is "ab" + "c" to the teacher and one token to the student
    base, (teacher, student) = VocabularyCells(*pair), map(token_bytes, pair)
    spanning = student.index(b"abc")
    for cells in (PushForwardCells(base), BytePrefixCells(base, teacher, student)):
        assert positions(cells, pair, "abc") == [(b"abc", True)]
        assert cells.target(probabilities(base))[cells.student_cells[spanning]] == 0
    assert base.target(probabilities(base))[base.student_cells[spanning]] > 0
    assert positions(StrictCells(base), pair, "abcb") == [(b"abc", False), (b"b", True)]


def test_spans_are_the_smallest_runs_over_the_same_bytes() -> None:
    pair = letters("abc", "a b"), letters("abc", "b c")
    strings = [token_bytes(tokenizer) for tokenizer in pair]
    ids = [tokenizer.encode("abcab") for tokenizer in pair]  # ab|c|ab and a|bc|a|b
    found = align(
        ids[0],
        [True] * 3,
        ids[1],
        [True] * 4,
        cells=VocabularyCells(*pair),
        teacher_tokens=strings[0],
        student_tokens=strings[1],
    )
    assert found is not None
    assert found.teacher_chunk == [0, 0, 1]
    assert found.chunk == [0, 0, 1, 1]
