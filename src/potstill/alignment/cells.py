"""Divide two vocabularies into common cells, so that a student can learn across tokenizers.

V_t, V_s: number of teacher and student ids. seg(v): the student's tokens for the bytes of teacher
token v. A cell holds tokens of both vocabularies that begin with the same bytes: a byte string that
is a token of both, and the tokens whose first piece is in the cell. Every token is in one cell;
special tokens, padding ids and tokens that the other side cannot spell are in none (−1).
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from potstill.alignment.segmentation import Segmenter
from potstill.alignment.stop_tokens import stop_tokens
from potstill.alignment.token_bytes import backend_settings, token_bytes
from potstill.errors import VocabularyMismatch
from potstill.protocols import Tokenizer


class VocabularyCells:
    """Map teacher and student ids to cells, and teacher probabilities to the student's next cell.

    ``teacher_stops`` (default: `stop_tokens` of the teacher) share one cell with ``student_end``
    (default: the student's first stop token).

    ``order`` sorts teacher tokens by their segmentation, so the tokens that start with the emitted
    student tokens are one range, and the target of a position is a sum over that range:

        start, stop = cells.prefix_range(emitted)
        mass = torch.zeros(cells.count)
        places = torch.arange(start, stop)
        next_cells = cells.next_cells(places, len(emitted))
        mass.index_add_(0, next_cells, teacher_probs[cells.order[places]])

    With nothing emitted this equals ``index_add`` over ``teacher_cells``.

    Raises: OpaqueTokenizer if the bytes of a tokenizer's tokens cannot be recovered;
    VocabularyMismatch if the vocabularies share no token.
    """

    segmentation: list[tuple[int, ...]]
    """The student's ids for each teacher id: empty for a special token, ``(student_end,)`` for a
    stop token."""
    teacher_cells: Tensor
    """``[V_t]`` the cell of each teacher id, or −1."""
    student_cells: Tensor
    """``[V_s]`` the cell of each student id, or −1."""
    count: int
    """Number of cells."""
    order: Tensor
    """``[n]`` the teacher ids that have a cell, in lexicographic order of their segmentation."""
    keeps_endings = False
    """True if a prefix range includes tokens that end at the prefix. False here: the text shows
    that the teacher's token continued."""
    most: int | None = None
    """Keep only the mass of this many heaviest cells at a position; None keeps all."""

    def __init__(
        self,
        teacher_tokenizer: Tokenizer,
        student_tokenizer: Tokenizer,
        *,
        teacher_stops: Iterable[int] | None = None,
        student_end: int | None = None,
    ) -> None:
        teacher_tokens = token_bytes(teacher_tokenizer)
        student_tokens = token_bytes(student_tokenizer)
        to_student = Segmenter(student_tokenizer, student_tokens)
        to_teacher = Segmenter(teacher_tokenizer, teacher_tokens)
        if to_student.ids.keys().isdisjoint(to_teacher.ids):
            raise VocabularyMismatch(
                "teacher and student have no token in common; use --method text instead"
            )
        segmentation, reverse = to_student(teacher_tokens), to_teacher(student_tokens)
        cells = _student_cells(student_tokens, to_teacher.ids, segmentation, reverse)
        if student_end is None:
            student_end = next(iter(stop_tokens(student_tokenizer)), None)
        stops = stop_tokens(teacher_tokenizer) if teacher_stops is None else list(teacher_stops)
        if student_end is not None and stops:
            cells[student_end] = max(cells) + 1
            for stop in stops:
                segmentation[stop] = (student_end,)
        self._build(segmentation, torch.tensor(cells))

    def _build(self, segmentation: list[tuple[int, ...]], student_cells: Tensor) -> None:
        """Set these attributes and compute all others from them."""
        self.segmentation, self.student_cells = segmentation, student_cells
        self.count = int(student_cells.max()) + 1
        self._student_cell_list = student_cells.tolist()
        first = torch.tensor([pieces[0] if pieces else -1 for pieces in segmentation])
        self.teacher_cells = torch.where(first < 0, -1, student_cells[first])
        with_cell = (self.teacher_cells >= 0).nonzero().flatten().tolist()
        self.order = torch.tensor(sorted(with_cell, key=segmentation.__getitem__))
        self._sorted = [segmentation[v] for v in self.order.tolist()]
        lengths = torch.tensor([len(pieces) for pieces in self._sorted])
        self.first_piece = lengths.cumsum(0) - lengths
        all_pieces = torch.tensor([piece for pieces in self._sorted for piece in pieces])
        self.piece_cells = student_cells[all_pieces]

    def prefix_range(self, emitted: tuple[int, ...] = ()) -> tuple[int, int]:
        """Return the range of ``order`` whose segmentation starts with ``emitted`` and continues.

        Tokens that end at ``emitted`` are excluded: the text shows that the token continued.
        """
        start = bisect_right(self._sorted, emitted)
        if not emitted:
            return start, len(self._sorted)
        return start, bisect_left(self._sorted, (*emitted[:-1], emitted[-1] + 1), lo=start)

    def follows(self, teacher_token: int, emitted: tuple[int, ...]) -> bool:
        """Return True if ``teacher_token`` is segmented into ``emitted`` and more pieces."""
        pieces = self.segmentation[teacher_token]
        return len(emitted) < len(pieces) and emitted == pieces[: len(emitted)]

    def seen(self, teacher_token: int, emitted: tuple[int, ...], token: int) -> int | None:
        """Return the observed cell after ``emitted``: that of the teacher token's next piece.

        ``token`` is the student's token in the text, which some baselines use; they return None for
        a position without a target.
        """
        return self.student_cell(self.segmentation[teacher_token][len(emitted)])

    def student_cell(self, token: int) -> int:
        """Return ``student_cells[token]``, from a list: indexing a tensor is slow."""
        cell: int = self._student_cell_list[token]
        return cell

    def depth(self, emitted: tuple[int, ...]) -> int:
        """Return the length of ``emitted`` in the unit that `next_cells` uses."""
        return len(emitted)

    def next_cells(self, places: Tensor, depth: int | Tensor) -> Tensor:
        """Return the cell of piece number ``depth`` of each token ``order[places]``, ``[k]``."""
        return self.piece_cells[self.first_piece[places] + depth]

    def target(self, teacher_probs: Tensor, emitted: tuple[int, ...] = ()) -> Tensor:
        """Return the distribution ``[count]`` of the student's next cell, after ``emitted``.

        t_c ∝ Σ q(v) over the teacher tokens whose segmentation starts with ``emitted`` and has a
        token of cell c next. This is the definition; the loss computes the same from ranges.
        Raises: ValueError if no token continues.
        """
        depth = len(emitted)
        continuations = [
            v
            for v, pieces in enumerate(self.segmentation)
            if len(pieces) > depth and pieces[:depth] == tuple(emitted)
        ]
        if not continuations:
            raise ValueError(f"no teacher token continues after the student tokens {emitted}")
        next_cells = self.student_cells[[self.segmentation[v][depth] for v in continuations]]
        mass = teacher_probs.new_zeros(self.count)
        mass.index_add_(0, next_cells, teacher_probs[continuations])
        return mass / mass.sum()

    def save(self, path: Path) -> None:
        """Write the cells to a safetensors file."""
        from safetensors.torch import save_file

        lengths = [len(pieces) for pieces in self.segmentation]
        pieces = [piece for pieces in self.segmentation for piece in pieces]
        saved = {"lengths": lengths, "pieces": pieces}
        tensors = {name: torch.tensor(ids, dtype=torch.int32) for name, ids in saved.items()}
        save_file({**tensors, "student_cells": self.student_cells}, path)

    @classmethod
    def load(cls, path: Path) -> VocabularyCells:
        """Read a file that `save` wrote."""
        from safetensors.torch import load_file

        saved = load_file(path)
        pieces, lengths = iter(saved["pieces"].tolist()), saved["lengths"].tolist()
        cells = cls.__new__(cls)
        segmentation = [tuple(next(pieces) for _ in range(length)) for length in lengths]
        cells._build(segmentation, saved["student_cells"])
        return cells


def cached_cells(
    teacher_tokenizer: Tokenizer,
    student_tokenizer: Tokenizer,
    folder: Path,
    *,
    teacher_stops: Iterable[int] | None = None,
    student_end: int | None = None,
) -> VocabularyCells:
    """Return `VocabularyCells` from ``folder``; compute and save them if they are not there.

    The file name is a hash of everything that the cells depend on.
    """
    stops = stop_tokens(teacher_tokenizer) if teacher_stops is None else list(teacher_stops)
    if student_end is None:
        student_end = next(iter(stop_tokens(student_tokenizer)), None)
    key = hashlib.sha256(f"cells 1 {stops} {student_end}".encode())  # 1: format of the file
    for tokenizer in (teacher_tokenizer, student_tokenizer):
        key.update(repr(backend_settings(tokenizer) or token_bytes(tokenizer)).encode())
    path = folder / f"cells-{key.hexdigest()[:32]}.safetensors"
    if path.is_file():
        return VocabularyCells.load(path)
    cells = VocabularyCells(
        teacher_tokenizer, student_tokenizer, teacher_stops=stops, student_end=student_end
    )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")  # another process may read `path`
    cells.save(unfinished)
    unfinished.replace(path)
    return cells


def own_cells(cells: Tensor) -> Tensor:
    """Replace the cell of every id that has one by a new cell for it alone, ``[V]`` → ``[V]``."""
    has_cell = cells >= 0
    return torch.where(has_cell, has_cell.cumsum(0) - 1, -1)


def _student_cells(
    tokens: list[bytes | None],
    teacher_ids: dict[bytes, int],
    segmentation: list[tuple[int, ...]],
    reverse: list[tuple[int, ...]],
) -> list[int]:
    """Return the cell of every student token, −1 for special ones.

    ``teacher_ids`` are by bytes, ``reverse`` has the teacher's tokens for each student token. A
    token u that the teacher does not have is in the cell of the first piece of its first teacher
    token. That piece is shorter than u, so going by length, its cell is already known. A token that
    the teacher cannot spell gets its own cell: it may still be a piece of a longer token.
    """
    cells = [-1] * len(tokens)
    by_bytes: dict[bytes, int] = {}
    spelled = ((string, u) for u, string in enumerate(tokens) if string)
    for string, u in sorted(spelled, key=lambda pair: len(pair[0])):
        first_pieces = segmentation[reverse[u][0]] if reverse[u] else ()
        if string in teacher_ids or not first_pieces:
            cells[u] = by_bytes.setdefault(string, len(by_bytes))
        else:
            cells[u] = cells[first_pieces[0]]
    return cells
