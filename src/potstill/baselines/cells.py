"""The cells of the literature's methods, with the attributes of `VocabularyCells`: what differs is which tokens go together.

    push_forward   every student token is a cell; a teacher token's mass goes to the first of its pieces
    bpm            the same, and the first piece is the longest student token that the teacher token's bytes begin with
    strict_topk    only tokens that both vocabularies have are cells, each one by itself, and only the teacher's likeliest

None of them looks at what the text has before it takes its target, which is what each of them gets wrong in its own way.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from potstill.alignment.cells import VocabularyCells, own_cells

STRICT_MOST = 64


class PushForwardCells(VocabularyCells):
    """Every student token its own cell, the teacher's mass pushed forward to the first piece of each of its tokens.

    At a root t(u) = Σ q(v) over the v with seg(v)[0] = u. After some pieces of a token: the same over the next piece of all that
    begin so, and what ends there keeps its mass, on everything that continues none (one residual cell). The obvious answer; no
    paper is its source.

    What it gets wrong: a student token that spans a teacher boundary (" docstring" over " doc" and "string") is first piece of
    nothing, so it has target 0 wherever it could stand, though the teacher writes those bytes. And that the token went on was
    seen in the text, so the mass of what ends is counted here and once more at the root that follows where it does end.
    """

    keeps_endings = True

    def __init__(self, base: VocabularyCells) -> None:
        self._settle(base.segmentation, own_cells(base.student_cells))
        self._lengths = torch.tensor([len(pieces) for pieces in self._sorted])

    def seen(self, teacher_token: int, emitted: tuple[int, ...], token: int) -> int | None:
        """That of ``token`` itself: nothing stands beside the target, whatever the text has."""
        return self.student_cell(token)

    def prefix_range(self, emitted: tuple[int, ...] = ()) -> tuple[int, int]:
        """Which part of ``order`` begins with ``emitted``; what ends there stands first."""
        start, stop = super().prefix_range(emitted)
        return (bisect_left(self._sorted, emitted), stop) if emitted else (start, stop)

    def next_cells(self, places: Tensor, depth: int | Tensor) -> Tensor:
        """``[k]`` as `VocabularyCells.next_cells`, and number ``count`` for what ends."""
        ended = self._lengths[places] <= depth
        place = (self.first_piece[places] + depth).masked_fill(ended, 0)
        return self.piece_cells[place].masked_fill(ended, self.count)

    def target(self, teacher_probs: Tensor, emitted: tuple[int, ...] = ()) -> Tensor:
        """The student's next token, ``[count + 1]``, the last for what ends."""
        mass = teacher_probs.new_zeros(self.count + 1)
        known = (self.teacher_cells >= 0).nonzero().flatten()
        ids, cells = known, self.teacher_cells[known]
        if emitted:
            places = torch.arange(*self.prefix_range(emitted))
            ids, cells = self.order[places], self.next_cells(places, self.depth(emitted))
        mass.index_add_(0, cells, teacher_probs[ids])
        return mass / mass.sum()


class BytePrefixCells(PushForwardCells):
    """Byte-Prefix Marginalization: each teacher token's mass goes to the longest student token that its bytes begin with.

    After some bytes of a teacher token the same holds for what is left of all tokens that begin with these bytes; what ends
    there is the residual. Source: *Cross-Tokenizer On-Policy Distillation via Byte-Prefix Marginalization*, 2026, arXiv
    2607.22334, of which we had the abstract. Ours teaches on the teacher's text, not the student's; where a student token
    straddles the beginning of a teacher token, the paper's bound over several teacher tokens is not computed and the text alone
    teaches; residual mass is kept inside a teacher token, and at its beginning (special tokens alone) left out.

    What it gets wrong: what `PushForwardCells` does; and the longest match need not be the student's own way to write these
    bytes, so mass goes to tokens that its tokenizer never writes there.
    """

    def __init__(self, base: VocabularyCells, teacher_tokens: list[bytes | None], student_tokens: list[bytes | None]) -> None:
        self._student_tokens = student_tokens
        # A stop token has a cell and no bytes; what has no cell is not to be spelled.
        self._spelled = [string if base.teacher_cells[v] >= 0 else None for v, string in enumerate(teacher_tokens)]
        known = _ids_of(student_tokens, base)
        longest = max(map(len, known))
        matches = [_longest_matches(string or b"", known, longest) for string in self._spelled]
        first = [tuple(found[:1]) or pieces[:1] for found, pieces in zip(matches, base.segmentation, strict=True)]
        self._settle(first, own_cells(base.student_cells))
        order = sorted((v for v, found in enumerate(matches) if found), key=lambda v: self._spelled[v] or b"")
        self.order = torch.tensor(order)
        self._bytes = [self._spelled[v] or b"" for v in order]
        self._lengths = torch.tensor([len(string) for string in self._bytes])
        self.first_piece = self._lengths.cumsum(0) - self._lengths
        self.piece_cells = self.student_cells[torch.tensor([u for v in order for u in matches[v]])]

    def follows(self, teacher_token: int, emitted: tuple[int, ...]) -> bool:
        """Whether the token's bytes begin with those of ``emitted``, in whatever pieces; nothing precedes a stop token."""
        string, written = self._spelled[teacher_token], self._spell(emitted)
        return not emitted if string is None else len(written) < len(string) and string.startswith(written)

    def depth(self, emitted: tuple[int, ...]) -> int:
        """In bytes."""
        return len(self._spell(emitted))

    def prefix_range(self, emitted: tuple[int, ...] = ()) -> tuple[int, int]:
        """Which part of ``order`` has bytes that begin with those of ``emitted``."""
        written = self._spell(emitted)
        start, last = bisect_left(self._bytes, written), written.rstrip(b"\xff")
        after = last[:-1] + bytes([last[-1] + 1]) if last else None
        return start, len(self._bytes) if after is None else bisect_left(self._bytes, after, lo=start)

    def _spell(self, emitted: tuple[int, ...]) -> bytes:
        return b"".join(self._student_tokens[u] or b"" for u in emitted)


class StrictCells(VocabularyCells):
    """Only tokens of the same bytes correspond, and only where one student token covers exactly one teacher token.

    t is the teacher's distribution over the tokens that both have, cut to its ``most`` likeliest and renormalized; everywhere
    else the text alone teaches. As in X-Token's strict partition (arXiv 2605.21699) and as the cautious setting of *Rethinking
    Cross-Tokenizer On-Policy Distillation: From Alignment Coverage to Supervision Reliability* (arXiv 2610.08448); of both we
    could read no more than abstracts, and k is ours.

    What it gets wrong: mass on tokens that the student does not have is dropped, and the student is taught that what they stand
    for does not occur (X-Token's "uncommon-token failure": whole numbers under a teacher that splits digits). Cutting and
    renormalizing is biased, too (losses/partitions.py keeps the rest as a cell instead).
    """

    def __init__(self, base: VocabularyCells, *, most: int | None = STRICT_MOST) -> None:
        cells = base.teacher_cells.tolist()
        in_one: list[tuple[int, ...]] = [
            pieces if len(pieces) == 1 and cell >= 0 else () for pieces, cell in zip(base.segmentation, cells, strict=True)
        ]
        shared = torch.full_like(base.student_cells, -1)
        shared[sorted({pieces[0] for pieces in in_one if pieces})] = 0
        self.most = most
        self._settle(in_one, own_cells(shared))

    def seen(self, teacher_token: int, emitted: tuple[int, ...], token: int) -> int | None:
        """That of ``token``, if it is the teacher's very token; no target otherwise."""
        return self.student_cell(token) if self.segmentation[teacher_token] == (token,) else None


def _ids_of(tokens: list[bytes | None], base: VocabularyCells) -> dict[bytes, int]:
    """The id of each byte string that is a student token; of several, the one that its teacher tokens are spelled with."""
    ids = {string: u for u, string in reversed(list(enumerate(tokens))) if string}
    ids |= {tokens[pieces[0]] or b"": pieces[0] for pieces in base.segmentation if len(pieces) == 1 and tokens[pieces[0]]}
    return ids


def _longest_matches(string: bytes, known: dict[bytes, int], longest: int) -> list[int]:
    """For each offset into ``string`` the longest token that stands there; none at all if one offset has none."""
    found = []
    for start in range(len(string)):
        ends = range(min(len(string), start + longest), start, -1)
        match = next((known[string[start:end]] for end in ends if string[start:end] in known), None)
        if match is None:
            return []
        found.append(match)
    return found
