"""Count how much an answer repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 4


def repeated_grams(tokens: Sequence[int]) -> tuple[int, int]:
    """Return how many runs of `GRAM` tokens occurred before in the answer, and how many there are.

    >>> repeated_grams([1, 2, 3, 4, 1, 2, 3, 4])
    (1, 5)
    """
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)
