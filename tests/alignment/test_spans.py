from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.alignment.spans import Group, boundaries, covering, groups


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    text = draw(st.binary(max_size=30))
    cuts = []
    for _ in range(2):
        at = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=20))})
        cuts.append([text[a:b] for a, b in pairwise(at)])
    return cuts[0], cuts[1]


@given(two_cuts())
def test_groups_cover_all_tokens_with_equal_bytes_and_none_can_be_split(
    cuts: tuple[list[bytes], list[bytes]],
) -> None:
    teacher, student = cuts
    found = groups(teacher, student)
    assert [i for g in found for i in range(g.teacher_start, g.teacher_stop)] == list(
        range(len(teacher))
    )
    assert [i for g in found for i in range(g.student_start, g.student_stop)] == list(
        range(len(student))
    )
    for g in found:
        ours, theirs = (
            teacher[g.teacher_start : g.teacher_stop],
            student[g.student_start : g.student_stop],
        )
        assert b"".join(ours) == b"".join(theirs)
        assert not {*boundaries(ours)[1:-1]} & {*boundaries(theirs)[1:-1]}


@given(two_cuts())
def test_the_covering_token_holds_the_byte_at_the_offset(
    cuts: tuple[list[bytes], list[bytes]],
) -> None:
    offsets = boundaries(cuts[0])
    places = [-1, *boundaries(cuts[1])]
    for offset, k in zip(places, covering(offsets, places), strict=True):
        holding = [i for i in range(len(cuts[0])) if offsets[i] <= offset < offsets[i + 1]]
        assert [k] == (holding or [-1])


def test_a_character_split_on_one_side_only_is_not_a_boundary() -> None:
    assert groups([b"\xe4\xb8", b"\xad!"], ["中".encode(), b"!"]) == [Group(0, 2, 0, 2)]


def test_different_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="different texts"):
        groups([b"a"], [b"b"])
