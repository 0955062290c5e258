"""Measure the text of an answer: similarity to the teacher's answer, length, and how it ends.

An answer is ``{"messages": […, the answer], "cut_off": …}``. Each measure is one number per answer,
so that methods can be compared answer by answer. chrF and ROUGE-L come from the libraries that
papers use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from potstill.data.words import words
from potstill.errors import ConfigError
from potstill.generation.filters import repetition_loop

Row = dict[str, Any]


def stops(row: Row) -> float:
    """Return 1 if the answer ended by itself, 0 if the token limit cut it off."""
    return float(not row.get("cut_off"))


def loops(row: Row) -> float:
    """Return 1 if some words are repeated many times in a row (`filters.repetition_loop`)."""
    return float(repetition_loop(row))


def length_words(row: Row) -> float:
    """Return the number of words."""
    return float(len(words(row["messages"][-1]["content"])))


def measures_against(names: list[str]) -> dict[str, Callable[[str, str], float]]:
    """Return functions of (answer, teacher's answer) by name (``chrf``, ``rouge_l``), 0 to 100.

    Raises: ConfigError for an unknown name, or if the library behind it is not installed.
    """
    for name in names:
        if name not in _AGAINST:
            raise ConfigError(
                f"text measure {name!r} is not known; use one of {', '.join(_AGAINST)}"
            )
    try:
        return {name: _AGAINST[name]() for name in names}
    except ImportError as error:
        raise ConfigError(
            f"--text-measures needs the package {error.name}: pip install 'potstill[measures]'"
        ) from None


def _chrf() -> Callable[[str, str], float]:
    """Return chrF: F2 of character n-grams up to 6. Source: Popović 2015."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return lambda answer, teachers: float(metric.sentence_score(answer, [teachers]).score)


def _rouge_l() -> Callable[[str, str], float]:
    """Return ROUGE-L: F1 of the longest common subsequence of words. Source: Lin 2004.

    The library's own tokenizer drops all characters but a to z and 0 to 9, so ours is used.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, teachers: 100 * float(scorer.score(teachers, answer)["rougeL"].fmeasure)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        """Split a text into words; rouge-score calls this."""
        return words(text)


_AGAINST = {"chrf": _chrf, "rouge_l": _rouge_l}
