"""Report in words whether training helped, by how much, and whether that is more than chance.

Both students are measured on the same held-out conversations, so the verdict uses the paired
difference (potstill.evaluation.paired). Without sums per conversation in evaluation.json, it checks
whether the two intervals overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation import MEASURES, OWN_MEASURES, TOKEN_MEASURES, measure_ratios
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
Cell = tuple[str, list[str], str]


@dataclass(frozen=True)
class Verdict:
    """A sentence, and the evidence for it."""

    tone: str
    """``good``, ``bad`` or ``open``."""
    headline: str
    reason: str


def verdict(evaluation: Evaluation | None) -> Verdict:
    """Return the verdict on one run; ``None`` is a run without an evaluation."""
    if evaluation is None:
        missing = "This folder has no evaluation.json: the run is not finished, or was interrupted."
        return Verdict("open", "Not measured yet.", missing)
    key, before, after = deciding_measure(evaluation)
    if before is None or after is None:
        missing = "evaluation.json has no measure (KL or bits per byte) both before and after."
        return Verdict("open", "The measurement is incomplete.", missing)
    certain, reason = _more_than_chance(evaluation, key, before, after)
    percent, up, down, where = "", "better", "worse", "at predicting the held-out text than before"
    if key == "kl_nats_per_token":
        up, down, where = "closer to", "further from", "its teacher than before"
        percent = f"{100 * (before - after) / before:.0f}\u00a0% " if before > after else ""
    if after >= before:
        change = down if certain and after > before else f"no {up}"
        return Verdict("bad", f"It did not help: the student is {change} {where}.", reason)
    improved = f"the student is {percent}{up} {where}"
    if certain:
        return Verdict("good", f"It helped: {improved}.", reason)
    return Verdict("open", f"Perhaps it helped: {improved}, but this is not certain.", reason)


def _more_than_chance(
    evaluation: Evaluation, key: str, before: float, after: float
) -> tuple[bool, str]:
    """Return True if the difference is certain, and the sentence that explains it."""
    gain = before - after
    what = "divergence" if key == "kl_nats_per_token" else "loss on the text"
    change = f"Its {what} went from {figure(before)} to {figure(after)} {MEASURES[key].unit}"
    difference = paired_change(evaluation, key)
    if difference is None:
        was, now = interval(evaluation, "before", key), interval(evaluation, "after", key)
        if not was or not now:
            return False, f"{change}. Without 95 % intervals, chance cannot be ruled out."
        if now[1] < was[0] or was[1] < now[0]:
            return True, f"{change}, and the 95 % intervals of before and after do not overlap."
        return False, f"{change}. The 95 % intervals of before and after overlap: it may be chance."
    direction, width = "down" if gain > 0 else "up", figure(difference.half_width)
    change += f", {direction} by {figure(abs(gain))} ± {width}"
    over = f"over {plural(difference.conversations, 'held-out conversation')}"
    if difference.conversations < FEWEST_CONVERSATIONS:
        too_few = f"too few to rule out chance, {FEWEST_CONVERSATIONS} are needed"
        return False, f"{change} {over}: {too_few}."
    if difference.certain:
        return True, f"{change}, paired {over}: more than chance (95 %)."
    uncertain = "the 95 % interval includes no change at all, so it may be chance"
    return False, f"{change}, paired {over}: {uncertain}."


def deciding_measure(evaluation: Evaluation) -> tuple[str, float | None, float | None]:
    """Return a measure with its values before and after, None where not measured.

    The measure is KL if it is defined, else (two tokenizers) bits per byte.
    """
    for key in ("kl_nats_per_token", "bits_per_byte"):
        before, after = value(evaluation, "before", key), value(evaluation, "after", key)
        if before is not None and after is not None:
            break
    return key, before, after


def paired_change(evaluation: Evaluation, key: str) -> Difference | None:
    """Return after − before, paired by conversation; None without sums per conversation."""
    try:
        sums = evaluation["conversations"]
        pairs = [measure_ratios(sums[when])[key] for when in ("after", "before")]
        after, before = (
            Ratios(*(np.stack([column]) for column in pair)) for pair in pairs if pair is not None
        )
        difference = paired_difference(after, before)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    finite = map(np.isfinite, (difference.value, difference.low, difference.high))
    return difference if all(finite) else None


def value(evaluation: Evaluation, model: str, key: str) -> float | None:
    """Return one measure of ``teacher``, ``before`` or ``after``."""
    return number(_of(evaluation, model).get(key))


def interval(evaluation: Evaluation, model: str, key: str) -> tuple[float, float] | None:
    """Return its 95 % interval, None without one."""
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
    """Describe the run and its result in two sentences; leave out what the files do not contain."""
    teacher = f"“{config['teacher']}”" if config.get("teacher") else "its teacher"
    student = f"The student “{config['student']}”" if config.get("student") else "The student"
    method = METHODS.get(str(config.get("method")), "from {}").format(teacher)
    steps = max((number(row.get("step")) or 0 for row in metrics), default=0)
    planned = config.get("max_steps")
    length = f" for {plural(steps, 'step')}" if steps else ""
    if evaluation is None and steps and planned:
        length = f" for {steps:.0f} of at most {planned} steps so far"
    seconds = max((number(row.get("seconds")) or 0 for row in metrics), default=0)
    length += f" ({duration(seconds)})" if seconds else ""
    trained_on = config.get("train_conversations")
    if conversations := number((evaluation or config).get("train_conversations", trained_on)):
        length += f" on {plural(conversations, 'conversation')}"
    verb = "was trained" if steps or evaluation is not None else "will be trained"
    done = f"{student} {verb}{length} {method}."
    return done if evaluation is None else f"{done} {_outcome(evaluation)}".strip()


def _outcome(evaluation: Evaluation) -> str:
    gap = number(evaluation.get("gap_closed"))
    if gap is None:
        return ""
    if gap < 0:
        grew = f"the gap to the teacher grew by {-100 * gap:.0f}\u00a0%"
        return f"In predicting the text it is worse than before: {grew}."
    return f"In predicting the text it has closed {100 * gap:.0f}\u00a0% of the gap to the teacher."


def quantized_teacher(evaluation: Evaluation | None) -> str:
    """Return a sentence on a teacher with quantized weights; empty for any other."""
    found = (evaluation or {}).get("quantization")
    if not isinstance(found, dict):
        return ""
    kind = f"The teacher's weights are quantized ({found.get('quantization')})."
    nats, tokens = number(found.get("kl_nats_per_token")), number(found.get("tokens"))
    measured_from = "The student's divergence is measured from the quantized teacher."
    if nats is None or tokens is None:
        reason = found.get("not_measured") or "evaluation.json has no figure"
        return f"{kind} What this costs was not measured: {reason}. {measured_from}"
    between = found.get("ci95")
    numbers = [number(end) for end in between] if isinstance(between, list) else []
    known = [figure(end) for end in numbers if end is not None]
    interval = f" (95\u00a0%: {known[0]} to {known[1]})" if len(known) == 2 else ""
    same = number(found.get("top1_agreement"))
    agree = f", with the same most likely token at {100 * same:.1f}\u00a0%" if same else ""
    where = f"on {plural(tokens, 'token')} of the text"
    cost = f"It is {figure(nats)} nats per token{interval} from full precision {where}{agree}."
    return f"{kind} {cost} {measured_from}"


def measure_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the table: a row per measure, a cell per model, and the paired change.

    A cell is (value, interval, remark), empty where nothing was measured.
    """
    rows = []
    own = {key: one for key, one in OWN_MEASURES.items() if key in _of(evaluation, "after")}
    for key, measure in (TOKEN_MEASURES | own).items():
        cells: list[Cell] = []
        for model in ("before", "after", "teacher"):
            if model == "teacher" and measure.of_teacher is not None:
                cells.append((figure(measure.of_teacher, key), [], "by definition"))
                continue
            found, between = value(evaluation, model, key), interval(evaluation, model, key) or ()
            note = "not measured" if found is None else ""
            cells.append(("" if found is None else figure(found, key), ends(between, key), note))
        change = paired_change(evaluation, key)
        changed = None
        if change is not None:
            changed = figure(change.value, key), figure(change.half_width, key)
        rows.append(_row(measure.title, measure.unit, measure.better, cells, changed))
    return rows + _task_rows(evaluation.get("tasks"))


def _row(
    name: str, unit: str, direction: str, cells: list[Cell], change: tuple[str, str] | None
) -> dict[str, Any]:
    return {"name": name, "unit": unit, "better": direction, "cells": cells, "change": change}


def _task_rows(tasks: Any) -> list[dict[str, Any]]:
    """Return a row per task metric (potstill.evaluation.tasks); intervals from standard errors."""
    try:
        rows = []
        for task, measured in tasks["after"].items():
            for metric in measured["stderr"]:
                cells: list[Cell] = []
                for model in ("before", "after", "teacher"):
                    found, error = tasks[model][task][metric], tasks[model][task]["stderr"][metric]
                    if found is None:
                        cells.append(("", [], "not finite"))
                    else:
                        cells.append((figure(found), ends(task_interval(found, error)), ""))
                unit = f"{metric}, {plural(measured['questions'], 'question')}"
                rows.append(_row(str(task), unit, better(measured, metric), cells, None))
        return rows
    except (KeyError, TypeError, AttributeError, ValueError):
        return []
