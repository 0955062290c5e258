"""Find the teacher prediction that gives the target of each supervised student token.

A student token u is at one of three places in the teacher's tokenization of the same bytes:

    root      both tokenizations have a boundary before u: any teacher token v may come next
    interior  the student has emitted the first d tokens of seg(v) since v began, and v continues
    other     u begins inside a v that the student did not write as seg(v), or outside the text
              that both sequences have in common: no target, plain cross-entropy

If u is not in the cell of v's next piece (it spans the end of v, or v is spelled otherwise), the
observed cell is still the cell of v's next piece: the target is an expectation over v.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from potstill.alignment.cells import VocabularyCells
from potstill.alignment.spans import boundaries, covering

NO_TARGET = -1


@dataclass
class Positions:
    """Locate the target of each token of the student's sequence, and count disagreements."""

    teacher_index: list[int]
    """Index of the token, in the teacher's sequence, whose prediction is the target; −1: none."""
    start: list[int]
    """The target is a sum over ``cells.order[start:stop]``."""
    stop: list[int]
    """End of that range, exclusive."""
    depth: list[int]
    """Pieces of the teacher's token already emitted; 0 at a root."""
    cell: list[int]
    """The observed cell: that of the teacher token's next piece, even if the student's token is
    in another cell."""
    chunk: list[int]
    """Span number: tokens with the same number on both sides are the fewest that cover the same
    bytes. −1: in no span."""
    teacher_chunk: list[int]
    """The same for each token of the teacher's sequence."""
    disagreeing_roots: int = 0
    """Tokens at a root that are not in the observed cell."""
    disagreeing_interiors: int = 0
    """The same, inside a teacher token."""

    @property
    def interiors(self) -> int:
        """Return the number of tokens with a target inside a teacher token."""
        return sum(map(bool, self.depth))

    @property
    def roots(self) -> int:
        """Return the number of tokens with a target at a boundary of both tokenizations."""
        return sum(k != NO_TARGET for k in self.teacher_index) - self.interiors


@dataclass
class _Turn:
    """Hold a run of supervised tokens: text, then optionally a special token that ends it.

    ``first`` is the index of its first token, ``end`` that of the special token.
    """

    first: int
    ids: list[int]
    pieces: list[bytes]
    end: int | None
    offsets: list[int] = field(default_factory=list)
    """Boundaries of ``pieces``, relative to the start of the common text."""


def align(
    teacher_ids: Sequence[int],
    teacher_mask: Sequence[bool],
    student_ids: Sequence[int],
    student_mask: Sequence[bool],
    *,
    cells: VocabularyCells,
    teacher_tokens: list[bytes | None],
    student_tokens: list[bytes | None],
) -> Positions | None:
    """Align one conversation; return None if it cannot be aligned.

    Both sequences render the same conversation, each with its own chat template. The masks mark the
    supervised tokens: each assistant turn's text and its end token. The texts may differ in spaces
    around them and in what one template writes before them. Any other difference in bytes or turns
    makes the result None. ``teacher_tokens`` and ``student_tokens`` come from `token_bytes`.
    """
    teacher_turns = _turns(teacher_ids, teacher_mask, teacher_tokens)
    student_turns = _turns(student_ids, student_mask, student_tokens)
    if teacher_turns is None or student_turns is None or len(teacher_turns) != len(student_turns):
        return None
    length = len(student_ids)
    start, stop, depth, cell = ([0] * length for _ in range(4))
    spans = [NO_TARGET] * length, [NO_TARGET] * len(teacher_ids)
    result = Positions([NO_TARGET] * length, start, stop, depth, cell, *spans)
    for teacher, student in zip(teacher_turns, student_turns, strict=True):
        common = _set_offsets(teacher, student)
        if common is None:
            return None
        _align_text(teacher, student, common, cells, result)
        _number_spans(teacher, student, common, result)
        _align_ends(teacher, student, common, cells, result)
    return result


def _turns(
    ids: Sequence[int], mask: Sequence[bool], tokens: list[bytes | None]
) -> list[_Turn] | None:
    """Return the runs of the mask; None if a run has a special token before its end."""
    turns = []
    for supervised, places in groupby(range(len(ids)), key=lambda i: bool(mask[i])):
        if supervised:
            run = list(places)
            pieces = [tokens[ids[i]] if ids[i] < len(tokens) else None for i in run]
            end = run[-1] if pieces[-1] is None else None
            text = [piece for piece in pieces if piece is not None]
            if len(text) != len(run) - (end is not None):
                return None
            turns.append(_Turn(run[0], [ids[i] for i in run], text, end))
    return turns


def _set_offsets(teacher: _Turn, student: _Turn) -> int | None:
    """Set the offsets of both turns; return the bytes of their common text, or None.

    One template may strip text, add a space before the answer, or open it with an empty thought. So
    the texts, or the stripped texts, must be equal up to the end; one may begin earlier.
    """
    texts = [b"".join(turn.pieces) for turn in (teacher, student)]
    for strip in (bytes, bytes.strip):
        a, b = map(strip, texts)
        if a == b or (a and b and (a.endswith(b) or b.endswith(a))):
            common = min(len(a), len(b))
            for turn, text in zip((teacher, student), texts, strict=True):
                begin = text.find(strip(text)) + len(strip(text)) - common
                turn.offsets = [offset - begin for offset in boundaries(turn.pieces)]
            return common
    return None


def _align_text(
    teacher: _Turn, student: _Turn, common: int, cells: VocabularyCells, result: Positions
) -> None:
    """Record the target of each student token of the text that has one."""
    root = 0  # the student token at which the teacher's current token begins
    for i, k in enumerate(covering(teacher.offsets, student.offsets[:-1])):
        begin, end = student.offsets[i], max(student.offsets[i + 1], teacher.offsets[k + 1])
        if k < 0 or teacher.offsets[k] < 0 or end > common:
            continue
        if teacher.offsets[k] == begin:
            root = i
        if student.offsets[root] != teacher.offsets[k]:
            continue
        emitted = tuple(student.ids[root:i])
        if not cells.follows(teacher.ids[k], emitted):
            continue
        observed = cells.seen(teacher.ids[k], emitted, student.ids[i])
        if observed is not None:
            _record(result, student.first + i, teacher.first + k, emitted, observed, cells)
        if observed != cells.student_cell(student.ids[i]):
            result.disagreeing_interiors += bool(emitted)
            result.disagreeing_roots += not emitted


def _number_spans(teacher: _Turn, student: _Turn, common: int, result: Positions) -> None:
    """Number the spans, which end at the common boundaries. Numbers continue from turn to turn."""
    shared = set(teacher.offsets).intersection(student.offsets)
    shared_ends = sorted(offset for offset in shared if 0 <= offset <= common)
    first = 1 + max(result.chunk, default=NO_TARGET)
    for turn, column in ((teacher, result.teacher_chunk), (student, result.chunk)):
        for i, (begin, end) in enumerate(pairwise(turn.offsets)):
            if shared_ends and shared_ends[0] <= begin and end <= shared_ends[-1]:
                column[turn.first + i] = first + bisect_right(shared_ends, begin) - 1


def _align_ends(
    teacher: _Turn, student: _Turn, common: int, cells: VocabularyCells, result: Positions
) -> None:
    """Record the end token as a root if both texts end on one byte and both end tokens match."""
    if teacher.end is None or student.end is None:
        return
    if teacher.offsets[-1] != common or student.offsets[-1] != common:
        return
    if cells.segmentation[teacher.ids[-1]] == (student.ids[-1],):
        observed = cells.student_cell(student.ids[-1])
        _record(result, student.end, teacher.end, (), observed, cells)
        result.chunk[student.end] = result.teacher_chunk[teacher.end] = 1 + max(result.chunk)


def _record(
    result: Positions,
    place: int,
    teacher_place: int,
    emitted: tuple[int, ...],
    observed: int,
    cells: VocabularyCells,
) -> None:
    result.teacher_index[place] = teacher_place
    result.start[place], result.stop[place] = cells.prefix_range(emitted)
    result.depth[place] = cells.depth(emitted)
    result.cell[place] = observed
