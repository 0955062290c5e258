"""Compare the cells with a direct implementation of their definition, by enumeration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.toys import by_range, letters, sentencepiece
from conftest import toy_tokenizer
from potstill.alignment import VocabularyCells, token_bytes
from potstill.errors import VocabularyMismatch

PAIRS = {
    "letters": (
        letters("abc", "a b", "ab c", "c c", "b c"),
        letters("abc", "b c", "a bc", "a a", "c c", "cc a"),
    ),
    "shorter student": (letters("ab", "a b", "ab a", "b b"), letters("ab")),
    "shorter teacher": (letters("ab"), letters("ab", "a b", "ab a", "b b")),
    "byte-level to sentencepiece": (toy_tokenizer(), sentencepiece()),
    "sentencepiece to byte-level": (sentencepiece(), toy_tokenizer()),
}


def spelled(tokenizer: Any, string: bytes, dummy: str = "") -> tuple[int, ...]:
    """Return the tokens of bytes inside a text: tokenize them after a letter that never merges."""
    tokens = token_bytes(tokenizer)
    if string in tokens:
        return (max(i for i, token in enumerate(tokens) if token == string),)
    ids = (
        tokenizer.encode("Q" + string.decode(), add_special_tokens=False)
        if b"Q" in tokens
        else tokenizer.encode(string.decode())
    )
    while b"Q" in b"".join(tokens[i] or b"" for i in ids):
        ids = ids[1:]
    return tuple(ids)


def cell_heads(teacher: Any, student: Any) -> tuple[list[bytes | None], list[bytes | None]]:
    """Return the head of the cell of each teacher and student id, by the recursive definition."""
    t, s = token_bytes(teacher), token_bytes(student)

    def head(string: bytes) -> bytes:
        if string in t:
            return string
        first = t[spelled(teacher, string)[0]]
        assert first is not None
        return head(s[spelled(student, first)[0]] or b"")

    students = [None if string is None else head(string) for string in s]
    teachers = [
        None if string is None else head(s[spelled(student, string)[0]] or b"") for string in t
    ]
    return teachers, students


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_cells_match_their_definition(pair: tuple[Any, Any]) -> None:
    cells = VocabularyCells(*pair)
    for found, heads in zip(
        (cells.teacher_cells, cells.student_cells), cell_heads(*pair), strict=True
    ):
        plain = [
            (cell, head)
            for cell, head in zip(found.tolist(), heads, strict=True)
            if head is not None
        ]
        assert all(cell >= 0 for cell, _ in plain)
        assert (
            len(set(plain)) == len({cell for cell, _ in plain}) == len({head for _, head in plain})
        )
    by_head = {
        head: cell
        for head, cell in zip(cell_heads(*pair)[0], cells.teacher_cells.tolist(), strict=True)
        if head
    }
    for head, cell in zip(cell_heads(*pair)[1], cells.student_cells.tolist(), strict=True):
        assert head is None or by_head[head] == cell


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_teacher_token_is_segmented_into_its_own_bytes(pair: tuple[Any, Any]) -> None:
    tokens, student = token_bytes(pair[0]), token_bytes(pair[1])
    for string, pieces in zip(tokens, VocabularyCells(*pair).segmentation, strict=True):
        if string is not None:
            assert b"".join(student[u] or b"?" for u in pieces) == string


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_target_is_the_teachers_mass_on_each_next_piece_by_enumeration(
    pair: tuple[Any, Any],
) -> None:
    cells = VocabularyCells(*pair)
    q = torch.rand(len(cells.teacher_cells), dtype=torch.float64).softmax(0)
    prefixes = {pieces[:d] for pieces in cells.segmentation for d in range(len(pieces))}
    for emitted in prefixes:
        expected = [0.0] * cells.count
        for v, pieces in enumerate(cells.segmentation):
            if len(pieces) > len(emitted) and pieces[: len(emitted)] == emitted:
                expected[int(cells.student_cells[pieces[len(emitted)]])] += float(q[v])
        wanted = torch.tensor(expected, dtype=torch.float64)
        target = cells.target(q, emitted)
        torch.testing.assert_close(target, wanted / wanted.sum(), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            target.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(by_range(cells, q, emitted), target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_root_is_one_index_add_over_the_teachers_cells(pair: tuple[Any, Any]) -> None:
    cells = VocabularyCells(*pair)
    q = torch.rand(len(cells.teacher_cells), dtype=torch.float64)
    known = cells.teacher_cells >= 0
    mass = q.new_zeros(cells.count).index_add_(0, cells.teacher_cells[known], q[known])
    torch.testing.assert_close(mass / mass.sum(), cells.target(q), rtol=0, atol=1e-12)


def test_a_prefix_that_starts_no_token_has_an_empty_range_and_no_target() -> None:
    cells = VocabularyCells(*PAIRS["letters"])
    end = cells.segmentation[0]
    while any(
        len(pieces) > len(end) and pieces[: len(end)] == end for pieces in cells.segmentation
    ):
        end = next(p for p in cells.segmentation if len(p) > len(end) and p[: len(end)] == end)
    start, stop = cells.prefix_range(end)
    assert start == stop
    with pytest.raises(ValueError, match="no teacher token continues"):
        cells.target(torch.ones(len(cells.teacher_cells)), end)


@pytest.mark.parametrize("make", [toy_tokenizer, sentencepiece, lambda: letters("ab", "a b")])
def test_with_the_same_tokenizer_every_cell_is_one_token_and_the_target_is_the_teacher(
    make: Any,
) -> None:
    cells = VocabularyCells(make(), make())
    strings = [string for string in token_bytes(make()) if string is not None]
    assert cells.count == len(set(strings)) + 1
    known = cells.student_cells >= 0
    if len(set(strings)) == len(
        strings
    ):  # SentencePiece has a letter twice: as itself and as a byte
        assert sorted(cells.student_cells[known].tolist()) == list(range(cells.count))
    torch.testing.assert_close(cells.teacher_cells, cells.student_cells)
    q = torch.rand(len(known), dtype=torch.float64) * known
    torch.testing.assert_close(
        cells.target(q)[cells.student_cells[known]], _shared_mass(cells, q)[known] / q.sum()
    )


def _shared_mass(cells: VocabularyCells, q: torch.Tensor) -> torch.Tensor:
    return torch.stack([q[cells.student_cells == cell].sum() for cell in cells.student_cells])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(0, 8))
def test_renumbering_either_vocabulary_changes_nothing(
    teacher_shift: int, student_shift: int
) -> None:
    merges = ("a b", "ab c", "c c", "b c"), ("b c", "a bc", "a a", "c c", "cc a")
    plain = VocabularyCells(letters("abc", *merges[0]), letters("abc", *merges[1]))
    shifted = [
        letters("abc", *merges[0], shift=teacher_shift),
        letters("abc", *merges[1], shift=student_shift),
    ]
    cells = VocabularyCells(*shifted)
    t_old, t_new = (token_bytes(tokenizer)[:7] for tokenizer in (PAIRS["letters"][0], shifted[0]))
    s_old, s_new = (token_bytes(tokenizer)[:8] for tokenizer in (PAIRS["letters"][1], shifted[1]))
    q = torch.rand(9, dtype=torch.float64)
    moved = q.clone()
    moved[[t_new.index(string) for string in t_old]] = q[:7]
    here = torch.tensor([s_new.index(string) for string in s_old])
    torch.testing.assert_close(
        cells.target(moved)[cells.student_cells[here]],
        plain.target(q)[plain.student_cells[:8]],
        rtol=0,
        atol=1e-12,
    )


def test_a_letter_and_its_byte_share_a_cell() -> None:
    student = sentencepiece()
    cells = VocabularyCells(toy_tokenizer(), student)
    letter, byte = student.convert_tokens_to_ids(["t", "<0x74>"])
    assert cells.student_cells[letter] == cells.student_cells[byte] >= 0
    assert cells.segmentation[toy_tokenizer().convert_tokens_to_ids("t")] == (letter,)


def test_all_the_teachers_stop_tokens_and_the_students_end_token_share_one_cell() -> None:
    teacher, student = toy_tokenizer(added=("<|turn|>",)), sentencepiece()
    teacher.chat_template = teacher.chat_template.replace("<|im_end|>", "<|turn|>")
    cells = VocabularyCells(teacher, student)
    assert (
        cells.teacher_cells[[265, 266]].tolist()
        == [int(cells.student_cells[2])] * 2
        == [cells.count - 1] * 2
    )
    assert (cells.student_cells == cells.count - 1).sum() == 1
    assert cells.teacher_cells[264] == cells.student_cells[1] == -1
    chosen = VocabularyCells(teacher, student, teacher_stops=[264], student_end=1)
    assert chosen.teacher_cells[264] == chosen.student_cells[1] == chosen.count - 1
    assert chosen.teacher_cells[265] == -1


def test_half_a_character_is_spelled_in_bytes() -> None:
    teacher = letters("".join(sorted({"ä", "¸", "Ń", "a"})), "ä ¸")
    cells = VocabularyCells(teacher, sentencepiece())
    half = teacher.convert_tokens_to_ids("ä¸")
    assert [token_bytes(sentencepiece())[u] for u in cells.segmentation[half]] == [b"\xe4", b"\xb8"]


def test_a_token_spelled_like_a_special_one_is_segmented_as_text() -> None:
    teacher, student = toy_tokenizer(), sentencepiece("< /", "</ s", "</s >")
    teacher.add_tokens(["</s>x"])
    pieces = VocabularyCells(teacher, student).segmentation[len(teacher) - 1]
    assert 2 not in pieces
    assert b"".join(token_bytes(student)[u] or b"?" for u in pieces) == b"</s>x"


def test_cells_are_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    cells = VocabularyCells(*PAIRS["byte-level to sentencepiece"])
    cells.save(tmp_path / "cells.safetensors")
    loaded = VocabularyCells.load(tmp_path / "cells.safetensors")
    assert vars(loaded).keys() == vars(cells).keys()
    for name, value in vars(cells).items():
        same = (
            torch.equal(value, vars(loaded)[name])
            if isinstance(value, torch.Tensor)
            else value == vars(loaded)[name]
        )
        assert same, name


def test_vocabularies_without_a_shared_token_are_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="no token in common"):
        VocabularyCells(letters("ab"), letters("cd"))
