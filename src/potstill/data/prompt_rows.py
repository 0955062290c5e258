"""Find the prompt and the last answer in an encoded conversation."""

from __future__ import annotations

from collections.abc import Sequence

from potstill.data.encoding import IGNORED, Encoded


def prompt_length(labels: Sequence[int]) -> int:
    """Return the number of tokens before the last answer; 0 if there is no prompt.

    >>> prompt_length([-100, -100, 5, 6, -100, -100, 7, 8, -100])
    6
    >>> prompt_length([-100, 5, 6])
    0
    """
    stop = next((i + 1 for i in reversed(range(len(labels))) if labels[i] != IGNORED), 0)
    start = next((i + 1 for i in reversed(range(stop)) if labels[i] == IGNORED), 0)
    return start if start > 1 else 0  # of plain text all but the first token is supervised


def answer_end(row: Encoded, special: frozenset[int], *, prefix: str = "") -> int | None:
    """Return the special token that ends the last answer of a row, None if none does."""
    labels = row[f"{prefix}labels"]
    last = next((label for label in reversed(labels) if label != IGNORED), None)
    return last if last in special else None


def with_answer(prompt: list[int], answer: list[int]) -> Encoded:
    """Return the row of a prompt and its answer, which is supervised."""
    return {"input_ids": [*prompt, *answer], "labels": [*[IGNORED] * len(prompt), *answer]}
