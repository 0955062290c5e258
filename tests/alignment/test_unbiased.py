"""Cell gradients equal text gradients in expectation and have less variance, by enumeration.

The student is a table with free logits for each prefix of tokens. Its gradient is p − [u] for text
and p − t̃ for cells (losses/partitions.py, completed target). The teacher's distribution is random
for each prefix.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.toys import by_range, letters
from potstill.alignment import PieceCells, VocabularyCells, align, token_bytes

DOUBLE = torch.float64
WORDS = ("- a", "- b", "-a b", "-ab a", "-ab b", "a a", "-b aa", "-b a")
PAIRS = {
    "whole words for pieces of words": (
        letters("-ab", *WORDS, words=True),
        letters("-ab", "- a", "b a", "a b", words=True),
    ),
    "tokens for letters": (letters("ab", "a b", "b b", "ab b"), letters("ab")),
    "the same tokens": (
        letters("-ab", "- a", "- b", "-a b", words=True),
        letters("-ab", "- a", "- b", "-a b", words=True),
    ),
}
CELLS = {"cells": lambda cells: cells, "pieces": PieceCells}
LENGTH = 3


class Teacher:
    """Return a next-token distribution for each prefix; stop after ``LENGTH`` tokens."""

    def __init__(self, tokenizer: Any, usable: list[int], seed: int = 0) -> None:
        self.size, self.usable, self.stop, self.seed = (
            len(tokenizer),
            usable,
            tokenizer.eos_token_id,
            seed,
        )

    def __call__(self, written: tuple[int, ...]) -> Tensor:
        q = torch.zeros(self.size, dtype=DOUBLE)
        if len(written) == LENGTH:
            q[self.stop] = 1
            return q
        rng = random.Random(f"{self.seed} {written}")
        for v in (*self.usable, self.stop):
            q[v] = rng.expovariate(1)
        return q / q.sum()

    def texts(
        self, written: tuple[int, ...] = (), probability: float = 1.0
    ) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yield every sequence, with its stop token, and its probability."""
        for v, chance in enumerate(self(written).tolist()):
            if chance and v == self.stop:
                yield (*written, v), probability * chance
            elif chance:
                yield from self.texts((*written, v), probability * chance)


def any_student(before: tuple[int, ...], size: int) -> Tensor:
    rng = random.Random(f"student {before}")
    return torch.tensor([rng.gauss(0, 1) for _ in range(size)], dtype=DOUBLE).softmax(0)


def completed_target(t: Tensor, p: Tensor, u: int, seen: int, cells: VocabularyCells) -> Tensor:
    """Return t̃(w) = t_c(w)·p(w | c(w)) + [w = u] − [c(w) = seen]·p(w | c(w))."""
    known = cells.student_cells >= 0
    cell = cells.student_cells.clamp(min=0)
    p_cells = p.new_zeros(cells.count).index_add_(0, cell[known], p[known])
    within = torch.where(known & (p > 0), p / p_cells[cell], 0)
    same = known & (cells.student_cells == seen)
    chosen = torch.zeros_like(p)
    chosen[u] = 1
    return t[cell] * within + chosen - same * within


def gradients(
    pair: tuple[Any, Any], kind: str, student: Any = any_student
) -> Iterator[tuple[Any, float, int, Tensor, Tensor]]:
    """Yield prefix, probability, token, text gradient and cell gradient of every position."""
    teacher_tokenizer, student_tokenizer = pair
    cells = CELLS[kind](VocabularyCells(*pair))
    strings, pieces = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
    usable = [
        v
        for v, string in enumerate(strings)
        if string and (string.startswith(b"-") or b"-" not in strings)
    ]
    teacher = Teacher(teacher_tokenizer, usable)
    for ids, probability in teacher.texts():
        text = b"".join(strings[v] or b"" for v in ids).decode()
        student_ids = [*student_tokenizer.encode(text), student_tokenizer.eos_token_id]
        masks = [True] * len(ids), [True] * len(student_ids)
        found = align(
            ids,
            masks[0],
            student_ids,
            masks[1],
            cells=cells,
            teacher_tokens=strings,
            student_tokens=pieces,
        )
        assert found is not None
        for i, u in enumerate(student_ids):
            before = tuple(student_ids[:i])
            p = student(before, len(student_tokenizer))
            chosen = torch.zeros_like(p)
            chosen[u] = 1
            target = chosen
            if found.teacher_index[i] >= 0:
                t = by_range(
                    cells, teacher(ids[: found.teacher_index[i]]), before[i - found.depth[i] :]
                )
                target = completed_target(t, p, u, found.cell[i], cells)
                torch.testing.assert_close(target.sum(), torch.ones((), dtype=DOUBLE))
            yield before, probability, u, p - chosen, p - target


every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
both_kinds = pytest.mark.parametrize("kind", CELLS)


def noise(pair: tuple[Any, Any], kind: str) -> tuple[float, float]:
    """Return the summed variance of the text gradient and of the cell gradient."""
    totals: dict[Any, Any] = defaultdict(lambda: [0.0, 0, 0, 0, 0])
    for before, probability, _, text, cell in gradients(pair, kind):
        for place, term in enumerate((1.0, text, cell, text**2, cell**2)):
            totals[before][place] = totals[before][place] + probability * term
    of_text = sum(
        float((square - mean**2 / weight).sum()) for weight, mean, _, square, _ in totals.values()
    )
    of_cells = sum(
        float((square - mean**2 / weight).sum()) for weight, _, mean, _, square in totals.values()
    )
    return of_text, of_cells


@every_pair
def test_pieces_have_at_most_the_variance_of_cells_and_about_half_for_split_words(
    pair: tuple[Any, Any],
) -> None:
    (text, cells), (_, pieces) = (noise(pair, kind) for kind in CELLS)
    assert pieces <= cells + 1e-12
    if pair is PAIRS["whole words for pieces of words"]:
        assert pieces < 0.55 * cells < 0.55 * text


@every_pair
@both_kinds
def test_the_mean_gradient_is_that_of_text_and_the_variance_at_each_position_is_never_larger(
    pair: tuple[Any, Any], kind: str
) -> None:
    totals: dict[Any, Any] = defaultdict(lambda: [0.0, 0, 0, 0, 0])
    for before, probability, _, text, cell in gradients(pair, kind):
        one = totals[before]
        for place, term in enumerate((1.0, text, cell, text**2, cell**2)):
            one[place] = one[place] + probability * term
    with_less = 0
    for weight, text, cell, text_square, cell_square in totals.values():
        torch.testing.assert_close(cell, text, rtol=0, atol=1e-12)
        text_variance = (text_square / weight - (text / weight) ** 2).sum()
        cell_variance = (cell_square / weight - (cell / weight) ** 2).sum()
        assert cell_variance <= text_variance + 1e-12
        with_less += bool(cell_variance < text_variance - 1e-3)
    assert with_less > 5


@every_pair
@both_kinds
def test_a_student_equal_to_the_teacher_over_bytes_has_no_expected_gradient(
    pair: tuple[Any, Any], kind: str
) -> None:
    writes: dict[Any, Tensor] = defaultdict(lambda: torch.zeros(len(pair[1]), dtype=DOUBLE))
    for before, probability, u, _, _ in gradients(pair, kind):
        writes[before][u] += probability
    totals: dict[Any, Any] = defaultdict(float)
    for before, probability, _, _, cell in gradients(
        pair, kind, lambda before, _: writes[before] / writes[before].sum()
    ):
        totals[before] = totals[before] + probability * cell
    for total in totals.values():
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
