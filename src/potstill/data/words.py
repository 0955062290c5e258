"""Split texts into words for comparison: lower case, no punctuation."""

from __future__ import annotations

import re

# Han, kana, Thai, Lao, Khmer and Myanmar have no spaces between words: each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Return the words of `text`, in order.

    >>> words("It rains, 雨天!")
    ['it', 'rains', '雨', '天']
    """
    return _WORD.findall(text.lower())


def ngrams(sequence: list[str], n: int) -> set[str]:
    """Return every run of `n` words as one string; for a shorter text, the whole text."""
    if len(sequence) <= n:
        return {" ".join(sequence)}
    return set(map(" ".join, zip(*(sequence[i:] for i in range(n)), strict=False)))
