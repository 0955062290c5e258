"""What the tasks of lm-evaluation-harness found (`--tasks`), of teacher, untouched student and each method."""

from __future__ import annotations

from collections.abc import Mapping

from potstill.comparison.finished_runs import FinishedRun
from potstill.evaluation.tasks import better, interval

Abilities = dict[str, tuple[float, float | None]]
"""By task and metric: the mean over seeds, and its standard error over questions, which more seeds do not lessen."""


def abilities(entrants: Mapping[str, list[FinishedRun]], untouched: str) -> dict[str, Abilities]:
    """Of ``teacher``, ``untouched`` and each method, where every run asked the same questions; else nothing."""
    first = next(iter(entrants.values()))
    asked = [_asked(run) for runs in entrants.values() for run in runs]
    if not asked[0] or any(one != asked[0] for one in asked):
        return {}
    return {
        "teacher": _mean(first[:1], "teacher"),
        untouched: _mean(first[:1], "before"),
        **{name: _mean(runs, "after") for name, runs in entrants.items()},
    }


def directions(entrants: Mapping[str, list[FinishedRun]]) -> dict[str, str]:
    """By task and metric: whether ``lower`` or ``higher`` is better."""
    first = next(iter(entrants.values()))[0].evaluation.get("tasks", {}).get("after", {})
    return {
        f"{task} {metric}": better(measured, metric)
        for task, measured in first.items()
        for metric in measured["stderr"]
    }


def in_figures(found: Abilities) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The values, and their 95 % intervals where a standard error is known."""
    ends = {
        name: interval(value, error) for name, (value, error) in found.items() if error is not None
    }
    return {name: value for name, (value, _) in found.items()}, ends


def _asked(run: FinishedRun) -> dict[str, int]:
    return {
        task: measured["questions"]
        for task, measured in run.evaluation.get("tasks", {}).get("after", {}).items()
    }


def _mean(runs: list[FinishedRun], when: str) -> Abilities:
    found = [run.evaluation["tasks"][when] for run in runs]
    means: Abilities = {}
    for task, measured in found[0].items():
        for metric, error in measured["stderr"].items():
            means[f"{task} {metric}"] = sum(one[task][metric] for one in found) / len(found), error
    return means
