"""Define every measure of a model: its names, its unit, and whether lower is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """One number about a model."""

    short: str
    """Column header."""
    title: str
    """Row label."""
    unit: str
    better: Literal["lower", "higher", ""]
    """Empty for an answer's length."""
    shown: Literal["number", "share", "score"] = "number"
    """Printed as it is, in per cent, or with one decimal."""
    of_teacher: float | None = None
    """The teacher's value, where it holds by definition."""

    @property
    def lower_is_better(self) -> bool:
        return self.better == "lower"


TOKEN_MEASURES = {
    "kl_nats_per_token": Measure(
        "KL", "Divergence from the teacher", "nats per token", "lower", of_teacher=0.0
    ),
    "nll_nats_per_token": Measure("NLL", "Surprise at the text", "nats per token", "lower"),
    "bits_per_byte": Measure("bits/byte", "Compression of the text", "bits per byte", "lower"),
    "top1_agreement": Measure(
        "top-1", "Same most likely token", "of all tokens", "higher", "share", of_teacher=1.0
    ),
}
"""Measured on given text."""

OWN_MEASURES = {
    "own_kl_nats_per_token": Measure(
        "own KL", "Divergence on its own answers", "nats per token", "lower", of_teacher=0.0
    ),
    "own_ended": Measure("own ends", "Own answers that end", "of all answers", "higher", "share"),
    "own_repeated": Measure(
        "own repeats", "Repetition in its own answers", "of all 4-grams", "lower", "share"
    ),
}
"""Measured on the answers that a student writes to held-out prompts (own_answers.py)."""

_LIKENESS = "Likeness to the teacher's answer"
TEXT_MEASURES = {
    "chrf": Measure("chrF", _LIKENESS, "chrF, of 100", "higher", "score"),
    "rouge_l": Measure("ROUGE-L", _LIKENESS, "ROUGE-L, of 100", "higher", "score"),
    "stops": Measure(
        "stops", "Answers that end by themselves", "of all answers", "higher", "share"
    ),
    "loops": Measure("loops", "Answers that repeat themselves", "of all answers", "lower", "share"),
    "length_words": Measure("words", "An answer's length", "an answer", "", "score"),
}
"""Measured on the answers that a model writes."""

MEASURES = TOKEN_MEASURES | OWN_MEASURES | TEXT_MEASURES
