"""Which tokens of two tokenizations of one text lie on the same bytes. Byte offsets alone decide; no strings are compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Group(NamedTuple):
    """The smallest runs of tokens that cover the same bytes on both sides."""

    teacher_start: int
    teacher_stop: int
    student_start: int
    student_stop: int


def boundaries(pieces: Sequence[bytes]) -> list[int]:
    """The byte offset before each token, and after the last: one more than there are tokens."""
    return [0, *accumulate(map(len, pieces))]


def groups(teacher_pieces: Sequence[bytes], student_pieces: Sequence[bytes]) -> list[Group]:
    """A group closes wherever both tokenizations have a boundary. Raises: ValueError if the bytes are not equal.

    >>> groups([b"the", b" cat"], [b"th", b"e", b" cat"])
    [Group(teacher_start=0, teacher_stop=1, student_start=0, student_stop=2), \
Group(teacher_start=1, teacher_stop=2, student_start=2, student_stop=3)]
    """
    if b"".join(teacher_pieces) != b"".join(student_pieces):
        raise ValueError("the two tokenizations are of different texts")
    teacher, student = boundaries(teacher_pieces), boundaries(student_pieces)
    student_index = {offset: i for i, offset in enumerate(student)}
    closes = [(t, student_index[offset]) for t, offset in enumerate(teacher) if offset in student_index]
    return [Group(t, t_next, s, s_next) for (t, s), (t_next, s_next) in pairwise(closes)]


def covering(teacher_offsets: Sequence[int], offsets: Sequence[int]) -> list[int]:
    """For each of the ascending ``offsets``: the teacher's token that holds the byte there; −1 before the first and after the last.

    ``teacher_offsets`` are its `boundaries`.
    """
    found, k, last = [], -1, len(teacher_offsets) - 1
    for offset in offsets:
        while k < last and teacher_offsets[k + 1] <= offset:
            k += 1
        found.append(k if k < last else -1)
    return found
