"""Measure a student: token scores (scores.py), held-out data (held_out.py) and tasks."""

from potstill.evaluation.evaluate import Comparison, Evaluation, evaluate
from potstill.evaluation.held_out import HeldOut, fingerprint, last_question
from potstill.evaluation.measures import MEASURES, OWN_MEASURES, TOKEN_MEASURES, Measure
from potstill.evaluation.scores import (
    TokenScores,
    conversation_sums,
    gap_closed,
    measure_ratios,
    score_tokens,
    summarize,
)
from potstill.evaluation.table import as_table
from potstill.evaluation.tasks import Tasks

__all__ = [
    "MEASURES",
    "OWN_MEASURES",
    "TOKEN_MEASURES",
    "Comparison",
    "Evaluation",
    "HeldOut",
    "Measure",
    "Tasks",
    "TokenScores",
    "as_table",
    "conversation_sums",
    "evaluate",
    "fingerprint",
    "gap_closed",
    "last_question",
    "measure_ratios",
    "score_tokens",
    "summarize",
]
