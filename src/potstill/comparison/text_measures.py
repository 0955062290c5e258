"""What can be said of an answer as text: how near it is to the teacher's, how long it is, and how it ends.

An answer is ``{"messages": […, the answer], "cut_off": …}``. Each measure is a number an answer, so that methods can be compared
answer by answer. chrF and ROUGE-L are counted by the libraries whose figures are the ones papers print.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from potstill.errors import ConfigError
from potstill.generation.filters import repetition_loop
from potstill.generation.words import words

Row = dict[str, Any]


def stops(row: Row) -> float:
    """1 if the answer came to its own end, 0 if the limit of tokens cut it off."""
    return float(not row.get("cut_off"))


def loops(row: Row) -> float:
    """1 if a run of words repeats itself without end (potstill.generation.filters)."""
    return float(repetition_loop(row))


def length_words(row: Row) -> float:
    """Its words."""
    return float(len(words(row["messages"][-1]["content"])))


def measures_against(names: list[str]) -> dict[str, Callable[[str, str], float]]:
    """Functions of an answer and the teacher's, each between 0 and 100, by name: ``chrf``, ``rouge_l``.

    Raises: ConfigError for a name not known, or if the library behind it is not installed.
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
    """Character n-grams to 6, F2. Source: Popović 2015, chrF."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return lambda answer, teachers: float(metric.sentence_score(answer, [teachers]).score)


def _rouge_l() -> Callable[[str, str], float]:
    """Longest common subsequence of words, F1. Source: Lin 2004, ROUGE. Words are ours: the library's own drop all but a to z."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, teachers: 100 * float(scorer.score(teachers, answer)["rougeL"].fmeasure)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        """What rouge-score asks of a tokenizer."""
        return words(text)


_AGAINST = {"chrf": _chrf, "rouge_l": _rouge_l}
