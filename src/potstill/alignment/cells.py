"""Cut two vocabularies into the same cells, so that a teacher's distribution is a target for a student who has other tokens.

V_t, V_s: the teacher's and the student's ids. seg(v): the student's tokens for the bytes of teacher token v. A cell holds tokens of
both that begin alike: its head is a byte string that both have as a token, and everything else joins the cell of its first piece.
Every token is in one cell, but special tokens, padded rows and what the other cannot spell are in none (−1).
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.alignment.segmentation import Segmenter
from potstill.alignment.stop_tokens import stop_tokens
from potstill.alignment.token_bytes import backend_settings, token_bytes
from potstill.errors import VocabularyMismatch


class VocabularyCells:
    """The cells of a pair of vocabularies, and what a teacher's probabilities say about the student's next cell.

    ``teacher_stops`` (default: its end-of-sequence token and the one its chat template ends turns with) share one cell with the
    student's ``student_end`` (default: what its template ends turns with, else its end-of-sequence token).

    Where the student has emitted some pieces of a teacher token, the teacher's tokens that go on from there stand side by side in
    ``order``; so the target of every position is a sum over one range of it:

        start, stop = cells.prefix_range(emitted)
        mass = torch.zeros(cells.count)
        places = torch.arange(start, stop)
        mass.index_add_(0, cells.next_cells(places, len(emitted)), teacher_probs[cells.order[places]])

    and with nothing emitted the same is ``index_add`` over ``teacher_cells``.

    Raises: OpaqueTokenizer if the bytes of either's tokens cannot be recovered; VocabularyMismatch if no bytes are shared.
    """

    segmentation: list[tuple[int, ...]]
    """The student's ids for each teacher id; none for a special token. A stop token's is the student's end token."""
    teacher_cells: Tensor
    """``[V_t]`` the cell of each teacher id, or −1."""
    student_cells: Tensor
    """``[V_s]`` the cell of each student id, or −1."""
    count: int
    """How many cells there are."""
    order: Tensor
    """``[n]`` the teacher ids that have a cell, by lexicographic order of their segmentation."""
    keeps_endings = False
    """Whether a prefix range holds the tokens that end there, too. Here they do not: the text shows that the token went on."""
    most: int | None = None
    """How many cells keep their mass at a position, the heaviest ones; None for all."""

    def __init__(
        self,
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        *,
        teacher_stops: Iterable[int] | None = None,
        student_end: int | None = None,
    ) -> None:
        teacher_tokens, student_tokens = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
        as_student = Segmenter(student_tokenizer, student_tokens)
        as_teacher = Segmenter(teacher_tokenizer, teacher_tokens)
        if as_student.ids.keys().isdisjoint(as_teacher.ids):
            raise VocabularyMismatch(
                "teacher and student have no token in common, not one byte; distil text instead (--method text)"
            )
        segmentation, backward = as_student(teacher_tokens), as_teacher(student_tokens)
        cells = _student_cells(student_tokens, as_teacher.ids, segmentation, backward)
        if student_end is None:
            student_end = next(iter(stop_tokens(student_tokenizer)), None)
        teacher_stops = stop_tokens(teacher_tokenizer) if teacher_stops is None else list(teacher_stops)
        if student_end is not None and teacher_stops:
            cells[student_end] = max(cells) + 1
            for stop in teacher_stops:
                segmentation[stop] = (student_end,)
        self._settle(segmentation, torch.tensor(cells))

    def _settle(self, segmentation: list[tuple[int, ...]], student_cells: Tensor) -> None:
        """All else follows from these two."""
        self.segmentation, self.student_cells = segmentation, student_cells
        self.count = int(student_cells.max()) + 1
        self._cell_of = student_cells.tolist()
        first = torch.tensor([pieces[0] if pieces else -1 for pieces in segmentation])
        self.teacher_cells = torch.where(first < 0, -1, student_cells[first])
        self.order = torch.tensor(sorted((self.teacher_cells >= 0).nonzero().flatten().tolist(), key=segmentation.__getitem__))
        self._sorted = [segmentation[v] for v in self.order.tolist()]
        lengths = torch.tensor([len(pieces) for pieces in self._sorted])
        self.first_piece = lengths.cumsum(0) - lengths
        self.piece_cells = student_cells[torch.tensor([piece for pieces in self._sorted for piece in pieces])]

    def prefix_range(self, emitted: tuple[int, ...] = ()) -> tuple[int, int]:
        """Which part of ``order`` begins with the student ids ``emitted`` and goes on after them.

        Tokens that end there are left out: the text shows that the teacher's token did not end.
        """
        start = bisect_right(self._sorted, emitted)
        if not emitted:
            return start, len(self._sorted)
        return start, bisect_left(self._sorted, (*emitted[:-1], emitted[-1] + 1), lo=start)

    def follows(self, teacher_token: int, emitted: tuple[int, ...]) -> bool:
        """Whether the student ids ``emitted`` are how ``teacher_token`` begins, with more of it to come."""
        pieces = self.segmentation[teacher_token]
        return len(emitted) < len(pieces) and emitted == pieces[: len(emitted)]

    def seen(self, teacher_token: int, emitted: tuple[int, ...], token: int) -> int | None:
        """The cell that was seen to happen where the text has ``token``: that of the teacher's next piece. None: no target."""
        return self.student_cell(self.segmentation[teacher_token][len(emitted)])

    def student_cell(self, token: int) -> int:
        """The cell of one student id, as ``student_cells`` has it but faster to ask one by one."""
        cell: int = self._cell_of[token]
        return cell

    def depth(self, emitted: tuple[int, ...]) -> int:
        """How far into a teacher token ``emitted`` reaches, as `next_cells` counts it."""
        return len(emitted)

    def next_cells(self, places: Tensor, depth: int | Tensor) -> Tensor:
        """``[k]`` the cell of piece ``depth`` of each token ``order[places]``; `prefix_range` gives them for ``depth`` pieces."""
        return self.piece_cells[self.first_piece[places] + depth]

    def target(self, teacher_probs: Tensor, emitted: tuple[int, ...] = ()) -> Tensor:
        """The student's next cell, ``[count]``, given the teacher's next token ``[V_t]`` and the pieces of it already emitted.

        t_c ∝ Σ q(v) over the teacher's tokens whose segmentation begins with ``emitted`` and has a token of cell c next. This is
        the definition, and the reference for what the loss computes by ranges. Raises: ValueError if no token goes on.
        """
        depth = len(emitted)
        going_on = [v for v, pieces in enumerate(self.segmentation) if len(pieces) > depth and pieces[:depth] == tuple(emitted)]
        if not going_on:
            raise ValueError(f"no teacher token goes on after the student tokens {emitted}")
        next_cells = self.student_cells[[self.segmentation[v][depth] for v in going_on]]
        mass = teacher_probs.new_zeros(self.count).index_add_(0, next_cells, teacher_probs[going_on])
        return mass / mass.sum()

    def save(self, path: Path) -> None:
        """Write the cells to a safetensors file."""
        from safetensors.torch import save_file

        lengths = torch.tensor([len(pieces) for pieces in self.segmentation], dtype=torch.int32)
        pieces = torch.tensor([piece for pieces in self.segmentation for piece in pieces], dtype=torch.int32)
        save_file({"lengths": lengths, "pieces": pieces, "student_cells": self.student_cells}, path)

    @classmethod
    def load(cls, path: Path) -> VocabularyCells:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        saved = load_file(path)
        pieces = iter(saved["pieces"].tolist())
        cells = cls.__new__(cls)
        cells._settle([tuple(next(pieces) for _ in range(n)) for n in saved["lengths"].tolist()], saved["student_cells"])
        return cells


def cached_cells(
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    folder: Path,
    *,
    teacher_stops: Iterable[int] | None = None,
    student_end: int | None = None,
) -> VocabularyCells:
    """`VocabularyCells` read from ``folder`` if this pair's are there, else computed and kept there.

    The file is named by a hash of all that the cells depend on, so another tokenizer finds another file.
    """
    stops = stop_tokens(teacher_tokenizer) if teacher_stops is None else list(teacher_stops)
    end = next(iter(stop_tokens(student_tokenizer)), None) if student_end is None else student_end
    key = hashlib.sha256(f"cells 1 {stops} {end}".encode())
    for tokenizer in (teacher_tokenizer, student_tokenizer):
        key.update(repr(backend_settings(tokenizer) or token_bytes(tokenizer)).encode())
    path = folder / f"cells-{key.hexdigest()[:32]}.safetensors"
    if path.is_file():
        return VocabularyCells.load(path)
    cells = VocabularyCells(teacher_tokenizer, student_tokenizer, teacher_stops=stops, student_end=end)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")  # renamed when whole: another process may be reading
    cells.save(unfinished)
    unfinished.replace(path)
    return cells


def own_cells(cells: Tensor) -> Tensor:
    """``[V]`` → ``[V]``: every id that has a cell gets one of its own."""
    known = cells >= 0
    return torch.where(known, known.cumsum(0) - 1, -1)


def _student_cells(
    tokens: list[bytes | None], shared: dict[bytes, int], segmentation: list[tuple[int, ...]], backward: list[tuple[int, ...]]
) -> list[int]:
    """The cell of every student token, −1 for special ones.

    ``shared`` holds the bytes of the teacher's tokens, ``backward`` the teacher's tokens for each student token. Each step of the
    way u → first piece of seg(first teacher token of u) is strictly shorter in bytes, so taking the short ones first finds every
    next stop decided. A token that the teacher cannot spell is alone in its cell: it may still be a piece of a longer one.
    """
    cells = [-1] * len(tokens)
    heads: dict[bytes, int] = {}
    for string, u in sorted(((string, u) for u, string in enumerate(tokens) if string), key=lambda pair: len(pair[0])):
        first_pieces = segmentation[backward[u][0]] if backward[u] else ()
        if string in shared or not first_pieces:
            cells[u] = heads.setdefault(string, len(heads))
        else:
            cells[u] = cells[first_pieces[0]]
    return cells
