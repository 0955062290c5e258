"""Measures of several models side by side, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from potstill.evaluation.measures import TOKEN_MEASURES


def as_table(measured: Mapping[str, Any]) -> str:
    """``{name: M}`` → a line a measure, and the last model's 95 % interval. What cannot be measured across tokenizers is a dash.

    With ``{"tasks": {name: …}}`` beside them (`Tasks.measure`) a line for each task's metrics, and the last model's standard error.
    """
    names = [name for name in measured if name != "tasks"]
    lines = [*_lines(names, "95 % interval of the last", _measures([measured[name] for name in names]))]
    if "tasks" in measured:
        lines += ["", *_lines(names, "standard error of the last", _metrics([measured["tasks"][name] for name in names]))]
    return "\n".join(lines)


Row = tuple[str, list[float | None], str]
"""What was measured, in each model, and how sure the last one's is."""


def _lines(names: list[str], certainty: str, rows: Iterator[Row]) -> Iterator[str]:
    shown = [*rows]
    width = max(22, *(len(label) + 2 for label, _, _ in shown))
    yield f"{'':<{width}}" + "".join(f"{name:>10}" for name in names) + f"   {certainty}"
    for label, values, sure in shown:
        numbers = "".join(f"{'–' if value is None else f'{value:.4f}':>10}" for value in values)
        yield f"{label:<{width}}{numbers}   {sure}".rstrip()


def _measures(models: list[Any]) -> Iterator[Row]:
    for name in TOKEN_MEASURES:
        interval = models[-1]["ci95"][name]
        yield name, [model[name] for model in models], "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _metrics(models: list[Any]) -> Iterator[Row]:
    for task, measured in models[-1].items():
        for metric, error in measured["stderr"].items():
            yield f"{task} {metric}", [model[task][metric] for model in models], "" if error is None else f"{error:.4f}"
