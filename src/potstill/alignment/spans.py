"""Find the tokens of two tokenizations that cover the same bytes, by byte offsets alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Group(NamedTuple):
    """Hold the smallest runs of tokens that cover the same bytes on both sides."""

    teacher_start: int
    teacher_stop: int
    student_start: int
    student_stop: int


def boundaries(pieces: Sequence[bytes]) -> list[int]:
    """Return the byte offset before each of n tokens and after the last: n + 1 numbers."""
    return [0, *accumulate(map(len, pieces))]


def groups(teacher_pieces: Sequence[bytes], student_pieces: Sequence[bytes]) -> list[Group]:
    """Return the groups; one ends at each common boundary. Raises: ValueError for different bytes.

    >>> [tuple(group) for group in groups([b"the", b" cat"], [b"th", b"e", b" cat"])]
    [(0, 1, 0, 2), (1, 2, 2, 3)]
    """
    if b"".join(teacher_pieces) != b"".join(student_pieces):
        raise ValueError("the two tokenizations are of different texts")
    teacher, student = boundaries(teacher_pieces), boundaries(student_pieces)
    student_index = {offset: i for i, offset in enumerate(student)}
    shared_boundaries = [
        (t, student_index[offset]) for t, offset in enumerate(teacher) if offset in student_index
    ]
    return [Group(t, t_next, s, s_next) for (t, s), (t_next, s_next) in pairwise(shared_boundaries)]


def covering(teacher_offsets: Sequence[int], offsets: Sequence[int]) -> list[int]:
    """Return the teacher token that holds the byte at each of the ascending ``offsets``.

    ``teacher_offsets`` are the `boundaries` of the teacher's tokens. −1: in none of them.
    """
    found, k, last = [], -1, len(teacher_offsets) - 1
    for offset in offsets:
        while k < last and teacher_offsets[k + 1] <= offset:
            k += 1
        found.append(k if k < last else -1)
    return found
