"""Print measures of several models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from potstill.evaluation.measures import OWN_MEASURES, TOKEN_MEASURES


def as_table(measured: Mapping[str, Any]) -> str:
    """Return a line per measure of ``{name: M}``, and the last model's 95 % interval.

    A dash is what cannot be measured across tokenizers. ``{"tasks": {name: …}}`` beside them
    (`Tasks.measure`) adds a line per metric with the last model's standard error.
    """
    names = [name for name in measured if name != "tasks"]
    models = [measured[name] for name in names]
    lines = [*_lines(names, f"95 % interval of {names[-1]}", _measures(models))]
    if "tasks" in measured:
        models = [measured["tasks"][name] for name in names]
        lines += ["", *_lines(names, f"standard error of {names[-1]}", _metrics(models))]
    return "\n".join(lines)


Row = tuple[str, list[float | None], str]
"""Label, value of each model, uncertainty of the last."""


def _lines(names: list[str], uncertainty: str, rows: Iterator[Row]) -> Iterator[str]:
    shown = [*rows]
    width = max(22, *(len(label) + 2 for label, _, _ in shown))
    yield f"{'':<{width}}" + "".join(f"{name:>10}" for name in names) + f"   {uncertainty}"
    for label, values, error in shown:
        numbers = "".join(f"{'–' if value is None else f'{value:.4f}':>10}" for value in values)
        yield f"{label:<{width}}{numbers}   {error}".rstrip()


def _measures(models: list[Any]) -> Iterator[Row]:
    for name in [*TOKEN_MEASURES, *(name for name in OWN_MEASURES if name in models[-1])]:
        ends = models[-1]["ci95"][name]
        interval = "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
        yield name, [model.get(name) for model in models], interval


def _metrics(models: list[Any]) -> Iterator[Row]:
    for task, measured in models[-1].items():
        for metric, error in measured["stderr"].items():
            values = [model[task][metric] for model in models]
            yield f"{task} {metric}", values, "" if error is None else f"{error:.4f}"
