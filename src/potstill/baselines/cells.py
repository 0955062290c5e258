"""Cells of methods from the literature, with the attributes of `VocabularyCells`.

    push_forward   every student token is a cell; a teacher token's mass goes to its first piece
    bpm            the same; the first piece is the longest student token that is a byte prefix
    strict_topk    only tokens of both vocabularies are cells; only the teacher's top k keep mass

None of them uses the observed text in its target. Each class names the error that follows.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from potstill.alignment.cells import VocabularyCells, own_cells
from potstill.alignment.student_text import StudentTextCells

STRICT_MOST = 64


class PushForwardCells(StudentTextCells):
    """Give every student token its own cell; push each teacher token's mass to its first piece.

    At a root t(u) = Σ q(v) over the v with seg(v)[0] = u. After some pieces: the same over the next
    piece of all tokens that start so. Tokens that end there keep their mass in one residual cell.
    Source: none; this is the obvious method.

    Defects: a student token across a teacher boundary (" docstring" over " doc" and "string") is
    never a first piece, so its target is 0 although the teacher can write those bytes. The text
    shows that the token continued, but the mass of tokens that end is counted here, and again at
    the next root.
    """

    def _cells(self, student_cells: Tensor) -> Tensor:
        return own_cells(student_cells)


class BytePrefixCells(PushForwardCells):
    """Byte-Prefix Marginalization: mass goes to the longest student token that is a byte prefix.

    After some bytes of a teacher token, the same holds for the remaining bytes of all tokens that
    start with them; tokens that end are the residual. Source: *Cross-Tokenizer On-Policy
    Distillation via Byte-Prefix Marginalization*, 2026, arXiv 2607.22334; only the abstract was
    available. Differences: this teaches on the teacher's text, not the student's. Where a student
    token spans a teacher token's start, the paper's bound over several teacher tokens is not
    computed (cross-entropy only). Residual mass is kept inside a teacher token. At its start, where
    only special tokens have such mass, it is dropped.

    Defects: those of `PushForwardCells`. Also, the longest match may be a token that the student's
    tokenizer never writes there.
    """

    def __init__(
        self,
        base: VocabularyCells,
        teacher_tokens: list[bytes | None],
        student_tokens: list[bytes | None],
    ) -> None:
        self._student_tokens = student_tokens
        # A stop token has a cell and no bytes. A token without a cell is not spelled.
        self._spelled = [
            string if base.teacher_cells[v] >= 0 else None
            for v, string in enumerate(teacher_tokens)
        ]
        known = _ids_of(student_tokens, base)
        longest = max(map(len, known))
        matches = [_longest_matches(string or b"", known, longest) for string in self._spelled]
        pairs = zip(matches, base.segmentation, strict=True)
        first = [tuple(found[:1]) or pieces[:1] for found, pieces in pairs]
        self._build(first, own_cells(base.student_cells))
        by_bytes = sorted((self._spelled[v] or b"", v) for v, found in enumerate(matches) if found)
        self.order = torch.tensor([v for _, v in by_bytes])
        self._bytes = [string for string, _ in by_bytes]
        self._lengths = torch.tensor([len(string) for string in self._bytes])
        self.first_piece = self._lengths.cumsum(0) - self._lengths
        self.piece_cells = self.student_cells[
            torch.tensor([u for _, v in by_bytes for u in matches[v]])
        ]

    def follows(self, teacher_token: int, emitted: tuple[int, ...]) -> bool:
        """Return True if the token's bytes start with those of ``emitted``, in any pieces.

        For a stop token, True only if nothing is emitted.
        """
        string, written = self._spelled[teacher_token], self._spell(emitted)
        if string is None:
            return not emitted
        return len(written) < len(string) and string.startswith(written)

    def depth(self, emitted: tuple[int, ...]) -> int:
        """Return the length of ``emitted`` in bytes."""
        return len(self._spell(emitted))

    def prefix_range(self, emitted: tuple[int, ...] = ()) -> tuple[int, int]:
        """Return the range of ``order`` whose bytes start with those of ``emitted``."""
        written = self._spell(emitted)
        start, last = bisect_left(self._bytes, written), written.rstrip(b"\xff")
        after = last[:-1] + bytes([last[-1] + 1]) if last else None
        return start, len(self._bytes) if after is None else bisect_left(
            self._bytes, after, lo=start
        )

    def _spell(self, emitted: tuple[int, ...]) -> bytes:
        return b"".join(self._student_tokens[u] or b"" for u in emitted)


class StrictCells(VocabularyCells):
    """Match only tokens of equal bytes, where one student token covers exactly one teacher token.

    t is the teacher's distribution over the shared tokens, cut to the top ``most``, renormalized.
    Other positions get cross-entropy. Sources: X-Token's strict partition (arXiv 2605.21699) and
    the cautious setting of *Rethinking Cross-Tokenizer On-Policy Distillation: From Alignment
    Coverage to Supervision Reliability* (arXiv 2610.08448). Only the abstracts were available; k is
    our choice.

    Defects: mass on tokens that the student lacks is dropped, so the student learns that their text
    does not occur (X-Token's "uncommon-token failure": whole numbers under a teacher that splits
    digits). Cutting and renormalizing is biased (losses/partitions.py keeps the rest as a cell).
    """

    def __init__(self, base: VocabularyCells, *, most: int | None = STRICT_MOST) -> None:
        pairs = zip(base.segmentation, base.teacher_cells.tolist(), strict=True)
        single: list[tuple[int, ...]] = [
            pieces if len(pieces) == 1 and cell >= 0 else () for pieces, cell in pairs
        ]
        shared = torch.full_like(base.student_cells, -1)
        shared[sorted({pieces[0] for pieces in single if pieces})] = 0
        self.most = most
        self._build(single, own_cells(shared))

    def seen(self, teacher_token: int, emitted: tuple[int, ...], token: int) -> int | None:
        """Return the cell of ``token`` if it has the teacher token's bytes, else None."""
        return self.student_cell(token) if self.segmentation[teacher_token] == (token,) else None


def _ids_of(tokens: list[bytes | None], base: VocabularyCells) -> dict[bytes, int]:
    """Map bytes to student ids; of several ids, use the one in the teacher tokens' segmentation."""
    ids = {string: u for u, string in reversed(list(enumerate(tokens))) if string}
    single = [pieces[0] for pieces in base.segmentation if len(pieces) == 1]
    return ids | {string: u for u in single if (string := tokens[u])}


def _longest_matches(string: bytes, known: dict[bytes, int], longest: int) -> list[int]:
    """Return the longest token at each offset of ``string``; empty if one offset has none."""
    found = []
    for start in range(len(string)):
        ends = range(min(len(string), start + longest), start, -1)
        match = next((known[string[start:end]] for end in ends if string[start:end] in known), None)
        if match is None:
            return []
        found.append(match)
    return found
