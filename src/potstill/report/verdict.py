"""Did it help, by how much, and is that more than chance? In plain words, from evaluation.json.

Before and after met the same held-out conversations, so what decides is their difference conversation by conversation
(potstill.evaluation.paired). An evaluation without sums a conversation falls back on whether two intervals overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation import MEASURES, TOKEN_MEASURES, measure_ratios
from potstill.evaluation.paired import FEWEST_CONVERSATIONS, Difference, Ratios, paired_difference
from potstill.evaluation.tasks import better
from potstill.evaluation.tasks import interval as task_interval
from potstill.report.formatting import duration, ends, figure, number, plural

METHODS = {
    "text": "by imitating what {} wrote",
    "logits": "by matching the next-token distribution of {}",
    "cross": "by matching the next-token distribution of {} across two tokenizers",
}

Evaluation = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A sentence, and the reason to believe or to doubt it."""

    tone: str
    """``good``, ``bad`` or ``open``."""
    headline: str
    reason: str


def verdict(evaluation: Evaluation | None) -> Verdict:
    """Of one run; ``None`` is a run without an evaluation."""
    if evaluation is None:
        return Verdict(
            "open",
            "Not measured yet.",
            "This folder has no evaluation.json: the run goes on, or it was interrupted.",
        )
    key, before, after = deciding_measure(evaluation)
    if before is None or after is None:
        missing = "The evaluation lacks both the divergence and the bits a byte, before training or after it."
        return Verdict("open", "The measurement is incomplete.", missing)
    certain, reason = _more_than_chance(evaluation, key, before, after)
    if key == "kl_nats_per_token":
        closer, further = (
            "closer to its teacher than before",
            "further from its teacher than before",
        )
        by = f"{100 * (before - after) / before:.0f}\u00a0% " if before > after else ""
    else:
        closer, further = (
            "better at predicting the held-out text than before",
            "worse at predicting the held-out text than before",
        )
        by = ""
    if after >= before:
        headline = f"It did not help: the student is {further if certain and after > before else f'no {closer}'}."
        return Verdict("bad", headline, reason)
    if certain:
        return Verdict("good", f"It helped: the student is {by}{closer}.", reason)
    return Verdict(
        "open", f"Perhaps it helped: the student measures {by}{closer}, but not certainly.", reason
    )


def _more_than_chance(
    evaluation: Evaluation, key: str, before: float, after: float
) -> tuple[bool, str]:
    """Whether the difference is certain, and the sentence that says why or why not."""
    gain = before - after
    what = "divergence" if key == "kl_nats_per_token" else "cost"
    said = f"Its {what} went from {figure(before)} to {figure(after)} {MEASURES[key].unit}"
    difference = paired_change(evaluation, key)
    if difference is None:
        was, now = interval(evaluation, "before", key), interval(evaluation, "after", key)
        if not was or not now:
            return False, f"{said}. No 95 % intervals were measured, so chance cannot be ruled out."
        if now[1] < was[0] or was[1] < now[0]:
            return True, f"{said}, and the 95 % intervals of before and after lie apart."
        return False, f"{said}. The 95 % intervals of before and after overlap: it may be chance."
    said += (
        f", {'down' if gain > 0 else 'up'} by {figure(abs(gain))} ± {figure(difference.half_width)}"
    )
    over = f"over {plural(difference.conversations, 'held-out conversation')}"
    if difference.conversations < FEWEST_CONVERSATIONS:
        return (
            False,
            f"{said} {over}: too few to rule out chance, {FEWEST_CONVERSATIONS} are needed.",
        )
    if difference.certain:
        return True, f"{said}, paired {over}: more than chance (95 %)."
    return (
        False,
        f"{said}, paired {over}: the 95 % interval includes no change at all, so it may be chance.",
    )


def deciding_measure(evaluation: Evaluation) -> tuple[str, float | None, float | None]:
    """KL before and after where it is defined, else (two tokenizers) bits a byte; None for what was not measured."""
    for key in ("kl_nats_per_token", "bits_per_byte"):
        before, after = value(evaluation, "before", key), value(evaluation, "after", key)
        if before is not None and after is not None:
            break
    return key, before, after


def paired_change(evaluation: Evaluation, key: str) -> Difference | None:
    """After − before, conversation by conversation; None where evaluation.json does not keep them."""
    try:
        kept = [
            measure_ratios(evaluation["conversations"][when])[key] for when in ("after", "before")
        ]
        after, before = (
            Ratios(*(np.stack([column]) for column in pair)) for pair in kept if pair is not None
        )
        difference = paired_difference(after, before)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    return (
        difference
        if all(map(np.isfinite, (difference.value, difference.low, difference.high)))
        else None
    )


def value(evaluation: Evaluation, model: str, key: str) -> float | None:
    """One measure of ``teacher``, ``before`` or ``after``."""
    return number(_of(evaluation, model).get(key))


def interval(evaluation: Evaluation, model: str, key: str) -> tuple[float, float] | None:
    """Its 95 % interval."""
    intervals = _of(evaluation, model).get("ci95")
    ends = intervals.get(key) if isinstance(intervals, dict) else None
    low, high = map(number, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _of(evaluation: Evaluation, model: str) -> Mapping[str, Any]:
    row = evaluation.get(model)
    return row if isinstance(row, dict) else {}


def story(
    config: Mapping[str, Any], evaluation: Evaluation | None, metrics: list[dict[str, Any]]
) -> str:
    """What was done and what came of it, in two sentences; whatever the files do not tell is left out."""
    teacher = f"“{config['teacher']}”" if config.get("teacher") else "its teacher"
    student = f"The student “{config['student']}”" if config.get("student") else "The student"
    method = METHODS.get(str(config.get("method")), "from {}").format(teacher)
    steps, planned = (
        max((number(row.get("step")) or 0 for row in metrics), default=0),
        config.get("max_steps"),
    )
    length = f" for {plural(steps, 'step')}" if steps else ""
    if evaluation is None and steps and planned:
        length = f" for {steps:.0f} of at most {planned} steps so far"
    seconds = max((number(row.get("seconds")) or 0 for row in metrics), default=0)
    length += f" ({duration(seconds)})" if seconds else ""
    if conversations := number(
        (evaluation or config).get("train_conversations", config.get("train_conversations"))
    ):
        length += f" on {plural(conversations, 'conversation')}"
    done = f"{student} {'was trained' if steps or evaluation is not None else 'is to be trained'}{length} {method}."
    return done if evaluation is None else f"{done} {_outcome(evaluation)}".strip()


def _outcome(evaluation: Evaluation) -> str:
    gap = number(evaluation.get("gap_closed"))
    if gap is None:
        return ""
    if gap < 0:
        return f"In predicting the text it is worse than before: the gap to the teacher grew by {-100 * gap:.0f}\u00a0%."
    return f"In predicting the text it has closed {100 * gap:.0f}\u00a0% of the gap to the teacher."


def measure_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The table: a row a measure, a cell a model, each with its figure and interval where there is one; and the paired change."""
    rows = []
    for key, measure in TOKEN_MEASURES.items():
        cells: list[tuple[str, list[str], str]] = []
        for model in ("before", "after", "teacher"):
            if model == "teacher" and measure.of_teacher is not None:
                cells.append((figure(measure.of_teacher, key), [], "by definition"))
                continue
            found, between = value(evaluation, model, key), interval(evaluation, model, key) or ()
            note = "not measured" if found is None else ""
            cells.append(("" if found is None else figure(found, key), ends(between, key), note))
        change = paired_change(evaluation, key)
        changed = (
            None if change is None else (figure(change.value, key), figure(change.half_width, key))
        )
        rows.append(
            {
                "name": measure.title,
                "unit": measure.unit,
                "better": measure.better,
                "cells": cells,
                "change": changed,
            }
        )
    return rows + _task_rows(evaluation.get("tasks"))


def _task_rows(tasks: Any) -> list[dict[str, Any]]:
    """What the models can do (potstill.evaluation.tasks): a row a metric of a task, with the interval of its standard error."""
    try:
        rows = []
        for task, measured in tasks["after"].items():
            for metric in measured["stderr"]:
                cells: list[tuple[str, list[str], str]] = []
                for model in ("before", "after", "teacher"):
                    found, error = tasks[model][task][metric], tasks[model][task]["stderr"][metric]
                    cells.append((figure(found), ends(task_interval(found, error)), ""))
                unit = f"{metric}, {plural(measured['questions'], 'question')}"
                rows.append(
                    {
                        "name": str(task),
                        "unit": unit,
                        "better": better(measured, metric),
                        "cells": cells,
                        "change": None,
                    }
                )
        return rows
    except (KeyError, TypeError, AttributeError, ValueError):
        return []
