"""Which of the teacher's predictions answers each token that the student is to learn.

The student learns a token u at each of its positions. Seen from the teacher's tokenization of the same bytes, it stands

    at a root       both have a boundary there: the teacher's next token v is still open
    in the interior the student has emitted the first d tokens of seg(v) since v began, and v goes on
    elsewhere       it begins inside a v that it did not follow from its start: nothing is known, plain cross-entropy

and elsewhere, too, is whatever lies outside the bytes that both render. Where u is not in the cell of v's (next) piece, because it
spans the end of v or v was spelled otherwise, what was seen is the cell of v: the expectation over the teacher's next token is
taken all the same, and what stands against it is that token's own cell, not u's.
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
    """For each token of the student's sequence where its target comes from, and how many came from where."""

    teacher_index: list[int]
    """The place in the teacher's sequence of the token that it predicts here; −1: no target."""
    start: list[int]
    """The target sums over ``cells.order[start:stop]`` …"""
    stop: list[int]
    """… up to here."""
    depth: list[int]
    """Pieces of the teacher's token already emitted; 0 at a root."""
    cell: list[int]
    """The cell that was seen to happen: that of the teacher's token (its next piece), be the student's token in it or not."""
    chunk: list[int]
    """Tokens of both with the same number cover the same bytes, and no fewer of them would; −1: in no chunk."""
    teacher_chunk: list[int]
    """The same for each token of the teacher's sequence."""
    disagreeing_roots: int = 0
    """How many tokens at a root are not in that cell: they span the end of the teacher's token, or spell it otherwise."""
    disagreeing_interiors: int = 0
    """How many tokens inside a teacher token are not."""

    @property
    def interiors(self) -> int:
        """How many tokens have a target inside a teacher token."""
        return sum(map(bool, self.depth))

    @property
    def roots(self) -> int:
        """How many tokens have a target at a boundary of both tokenizations."""
        return sum(k != NO_TARGET for k in self.teacher_index) - self.interiors


@dataclass
class _Turn:
    """A run of tokens to learn: text, then perhaps the special token that ends it."""

    first: int
    ids: list[int]
    pieces: list[bytes]
    end: int | None
    offsets: list[int] = field(default_factory=list)
    """The boundaries of ``pieces``, counted from where the text begins that both renderings have."""


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
    """Where the student's tokens find their targets in one conversation; None if it cannot be aligned.

    Both sequences are of the same conversation, each rendered with its own chat template, and the masks say what is to be learned:
    in each of the assistant's turns its text and the token that ends it. The texts may differ in blanks around them and in what
    one template writes before them; any other difference of bytes, or of turns, makes the conversation not alignable.
    ``teacher_tokens`` and ``student_tokens`` are what `token_bytes` gives.
    """
    teacher_turns = _turns(teacher_ids, teacher_mask, teacher_tokens)
    student_turns = _turns(student_ids, student_mask, student_tokens)
    if teacher_turns is None or student_turns is None or len(teacher_turns) != len(student_turns):
        return None
    length = len(student_ids)
    start, stop, depth, cell = ([0] * length for _ in range(4))
    chunks = [NO_TARGET] * length, [NO_TARGET] * len(teacher_ids)
    found = Positions([NO_TARGET] * length, start, stop, depth, cell, *chunks)
    for teacher, student in zip(teacher_turns, student_turns, strict=True):
        common = _lay_on_common_text(teacher, student)
        if common is None:
            return None
        _align_text(teacher, student, common, cells, found)
        _number_chunks(teacher, student, common, found)
        _bridge_ends(teacher, student, common, cells, found)
    return found


def _turns(ids: Sequence[int], mask: Sequence[bool], tokens: list[bytes | None]) -> list[_Turn] | None:
    """The runs of the mask; None if a special token stands inside one: its bytes are not the text's."""
    turns = []
    for chosen, places in groupby(range(len(ids)), key=lambda i: bool(mask[i])):
        if chosen:
            run = list(places)
            pieces = [tokens[ids[i]] if ids[i] < len(tokens) else None for i in run]
            end = run[-1] if pieces[-1] is None else None
            text = [piece for piece in (pieces if end is None else pieces[:-1]) if piece is not None]
            if len(text) != len(run) - (end is not None):
                return None
            turns.append(_Turn(run[0], [ids[i] for i in run], text, end))
    return turns


def _lay_on_common_text(teacher: _Turn, student: _Turn) -> int | None:
    """Count the offsets of both from where their common text begins, and return its bytes; None if the texts differ.

    One template may trim what the other leaves, put a blank before the answer, or open it with an empty thought. So the texts, or
    else the texts without the blanks around them, must be the same to the end, and one may begin earlier.
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


def _align_text(teacher: _Turn, student: _Turn, common: int, cells: VocabularyCells, found: Positions) -> None:
    root = 0
    for i, k in enumerate(covering(teacher.offsets, student.offsets[:-1])):
        begins, ends = student.offsets[i], max(student.offsets[i + 1], teacher.offsets[k + 1])
        if k < 0 or teacher.offsets[k] < 0 or ends > common:
            continue
        if teacher.offsets[k] == begins:
            root = i
        if student.offsets[root] != teacher.offsets[k]:
            continue
        emitted = tuple(student.ids[root:i])
        if not cells.follows(teacher.ids[k], emitted):
            continue
        seen = cells.seen(teacher.ids[k], emitted, student.ids[i])
        if seen is not None:
            _record(found, student.first + i, teacher.first + k, emitted, seen, cells)
        if seen != cells.student_cell(student.ids[i]):
            found.disagreeing_interiors += bool(emitted)
            found.disagreeing_roots += not emitted


def _number_chunks(teacher: _Turn, student: _Turn, common: int, found: Positions) -> None:
    """A chunk closes wherever both tokenizations have a boundary, and numbers go on from turn to turn."""
    closes = sorted(set(teacher.offsets).intersection(student.offsets).intersection(range(common + 1)))
    first = 1 + max(found.chunk, default=NO_TARGET)
    for turn, column in ((teacher, found.teacher_chunk), (student, found.chunk)):
        for i, (begin, end) in enumerate(pairwise(turn.offsets)):
            if closes and closes[0] <= begin and end <= closes[-1]:
                column[turn.first + i] = first + bisect_right(closes, begin) - 1


def _bridge_ends(teacher: _Turn, student: _Turn, common: int, cells: VocabularyCells, found: Positions) -> None:
    """The turn's last token is a root, too, if both texts end on the same byte and both end tokens are in the stop cell."""
    if teacher.end is None or student.end is None or teacher.offsets[-1] != common or student.offsets[-1] != common:
        return
    if cells.segmentation[teacher.ids[-1]] == (student.ids[-1],):
        _record(found, student.end, teacher.end, (), cells.student_cell(student.ids[-1]), cells)
        found.chunk[student.end] = found.teacher_chunk[teacher.end] = 1 + max(found.chunk)


def _record(found: Positions, place: int, teacher_place: int, emitted: tuple[int, ...], seen: int, cells: VocabularyCells) -> None:
    found.teacher_index[place] = teacher_place
    found.start[place], found.stop[place] = cells.prefix_range(emitted)
    found.depth[place] = cells.depth(emitted)
    found.cell[place] = seen
