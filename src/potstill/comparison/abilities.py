"""Compare scores on lm-evaluation-harness tasks (`--tasks`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.comparison.finished_runs import FinishedRun
from potstill.evaluation.tasks import better, interval

Abilities = dict[str, tuple[float, float | None]]
"""By task and metric: the mean over seeds, and the standard error over questions of one run (more
seeds do not reduce it)."""


def abilities(runs: Mapping[str, list[FinishedRun]], untouched: str) -> dict[str, Abilities]:
    """Return the scores of ``teacher``, ``untouched`` and each method.

    Empty if the runs did not all answer the same questions.
    """
    first = next(iter(runs.values()))
    asked = [_question_counts(run) for each in runs.values() for run in each]
    if not asked[0] or any(one != asked[0] for one in asked):
        return {}
    return {
        "teacher": _mean(first[:1], "teacher"),
        untouched: _mean(first[:1], "before"),
        **{name: _mean(each, "after") for name, each in runs.items()},
    }


def directions(runs: Mapping[str, list[FinishedRun]]) -> dict[str, str]:
    """Return by task and metric which is better: ``lower`` or ``higher``."""
    return {
        f"{task} {metric}": better(measured, metric)
        for task, measured in _after(next(iter(runs.values()))[0]).items()
        for metric in measured["stderr"]
    }


def in_figures(found: Abilities) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the values, and 95 % intervals where the standard error is known."""
    ends = {
        name: interval(value, error) for name, (value, error) in found.items() if error is not None
    }
    return {name: value for name, (value, _) in found.items()}, ends


def _after(run: FinishedRun) -> dict[str, Any]:
    scores: dict[str, Any] = run.evaluation.get("tasks", {}).get("after", {})
    return scores


def _question_counts(run: FinishedRun) -> dict[str, int]:
    return {task: measured["questions"] for task, measured in _after(run).items()}


def _mean(runs: list[FinishedRun], when: str) -> Abilities:
    found = [run.evaluation["tasks"][when] for run in runs]
    means: Abilities = {}
    for task, measured in found[0].items():
        for metric, error in measured["stderr"].items():
            values = [one[task][metric] for one in found]
            if None not in values:  # not finite
                means[f"{task} {metric}"] = sum(values) / len(values), error
    return means
