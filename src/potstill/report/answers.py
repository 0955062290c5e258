"""Answers side by side: a question a row, a model a column, cut so that two hundred of them are a page that opens at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from potstill.report.formatting import cut

PAGE_BYTES = 1_600_000  # for all texts together
MOST_BYTES = 4000  # of one text


@dataclass(frozen=True)
class Text:
    """One text as far as it is shown, and how many characters are left out."""

    kept: str
    left_out: int


@dataclass(frozen=True)
class Answers:
    """All questions with their answers: ``columns`` are the models' names, ``rows`` a question and an answer of each."""

    columns: list[str]
    rows: list[tuple[Text, list[Text]]]


def side_by_side(questions: list[object], answers: Mapping[str, list[object]]) -> Answers:
    """``answers``: by model, one to each question."""
    room = min(MOST_BYTES, PAGE_BYTES // max(1, len(questions) * (1 + len(answers))))
    rows = [
        (Text(*cut(question, room)), [Text(*cut(given[i], room)) for given in answers.values()])
        for i, question in enumerate(questions)
    ]
    return Answers(list(answers), rows)
