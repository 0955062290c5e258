"""Lay answers out side by side, one row per question, one column per model, within a size limit."""

from collections.abc import Mapping
from dataclasses import dataclass

from potstill.report.formatting import cut

PAGE_BYTES = 1_600_000  # all texts together; a page with 200 questions then opens at once
MAX_TEXT_BYTES = 4000


@dataclass(frozen=True)
class Text:
    """The shown beginning of a text, and the number of characters left out."""

    kept: str
    left_out: int


@dataclass(frozen=True)
class Answers:
    """The models' names, and for each question its text and one answer per model."""

    columns: list[str]
    rows: list[tuple[Text, list[Text]]]


def side_by_side(questions: list[object], answers: Mapping[str, list[object]]) -> Answers:
    """Cut and arrange ``answers``: by model, one per question."""
    limit = min(MAX_TEXT_BYTES, PAGE_BYTES // max(1, len(questions) * (1 + len(answers))))
    rows = [
        (Text(*cut(question, limit)), [Text(*cut(given[i], limit)) for given in answers.values()])
        for i, question in enumerate(questions)
    ]
    return Answers(list(answers), rows)
