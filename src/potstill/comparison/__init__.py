"""Several finished runs beside each other: which is better, by how much, and is that more than chance?"""

from potstill.comparison.compare_runs import UNTOUCHED, Answers, Entrants, compare_runs
from potstill.comparison.finished_runs import ANSWERS, FinishedRun, open_run, read_answers
from potstill.comparison.page import as_html
from potstill.comparison.table import as_text
from potstill.comparison.text_measures import measures_against

__all__ = [
    "ANSWERS",
    "UNTOUCHED",
    "Answers",
    "Entrants",
    "FinishedRun",
    "as_html",
    "as_text",
    "compare_runs",
    "measures_against",
    "open_run",
    "read_answers",
]
