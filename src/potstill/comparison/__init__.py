"""Compare finished runs: which method is better, by how much, and is the difference certain?"""

from potstill.comparison.compare_runs import UNTOUCHED, Answers, RunsByMethod, compare_runs
from potstill.comparison.finished_runs import ANSWERS, FinishedRun, open_run, read_answers
from potstill.comparison.folder import read_data, write_answers, write_data
from potstill.comparison.page import as_html
from potstill.comparison.table import as_text
from potstill.comparison.text_measures import measures_against

Entrants = RunsByMethod  # earlier name

__all__ = [
    "ANSWERS",
    "UNTOUCHED",
    "Answers",
    "Entrants",
    "FinishedRun",
    "RunsByMethod",
    "as_html",
    "as_text",
    "compare_runs",
    "measures_against",
    "open_run",
    "read_answers",
    "read_data",
    "write_answers",
    "write_data",
]
