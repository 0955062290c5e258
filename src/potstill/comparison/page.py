"""A comparison as one HTML page that opens offline (templates/comparison.html.j2), of the same parts as a run's report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from potstill.comparison.compare_runs import UNTOUCHED, Answers, Entrants
from potstill.comparison.finished_runs import FinishedRun
from potstill.comparison.table import basis, headings, rows
from potstill.evaluation import MEASURES
from potstill.report.answers import Answers as SideBySide
from potstill.report.answers import side_by_side
from potstill.report.curves import Curve, panels
from potstill.report.formatting import duration, figure, number, plural
from potstill.report.page import settings_rows
from potstill.report.template import render
from potstill.report.token_view import token_views, worst_prompts
from potstill.report.verdict import Verdict
from potstill.run_folder import RunFolder


def as_html(
    comparison: Mapping[str, Any],
    entrants: Entrants,
    untouched_answers: Answers | None = None,
    *,
    folder: Path = Path(),
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> str:
    """The page, to stand in ``folder``. Whatever a model or a file name says is shown as text."""
    best_first = {name: entrants[name] for name in comparison["methods"] if name in entrants}
    curves = [
        Curve(name, list(entrants).index(name), run.config, RunFolder(run.folder).read_metrics()[0])
        for name, runs in best_first.items()
        for run in runs
    ]
    models = _models(comparison, best_first)
    unit, worst = worst_prompts(models) if models else ("", [])
    return render(
        "comparison.html.j2",
        package="potstill.comparison",
        verdict=verdict(comparison),
        basis=basis(comparison),
        headings=list(headings(comparison).values()),
        rows=rows(comparison),
        pairs=_advantages(comparison),
        unit=MEASURES[comparison["measure"]].unit,
        notes=comparison["notes"],
        panels=panels(curves),
        answers=_answers(comparison, best_first, untouched_answers),
        views=token_views(models),
        seed=comparison["seeds"][0],
        regressions=comparison["regressions"],
        shown=lambda value: figure(value, comparison["measure"]),
        worst_names=list(models),
        worst_unit=unit,
        worst_prompts=worst,
        runs=[_run(name, run, folder) for name, each in best_first.items() for run in each],
        settings=settings_rows(
            {name: value for name, value in (settings or {}).items() if value not in (None, "", {})}
        ),
        command=command,
    )


def verdict(comparison: Mapping[str, Any]) -> Verdict:
    """The best against the next, and the best method against the untouched student."""
    first = comparison["pairs"][0]
    said = [f"Paired over {basis(comparison)}; the same data, order of data and budget for each."]
    methods = [name for name in comparison["methods"] if name != UNTOUCHED]
    for pair in comparison["pairs"][1:]:
        if methods and {pair["one"], pair["other"]} == {methods[0], UNTOUCHED}:
            said.insert(0, f"{_sentence(pair['verdict'])}.")
    tone = "open" if not first["certain"] else ("bad" if first["one"] == UNTOUCHED else "good")
    return Verdict(tone, f"{_sentence(first['verdict'])}.", " ".join(said))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _advantages(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each pair's verdict, and by how much the one is ahead of the other as places on a line that all pairs share, 0 to 100."""
    measure = comparison["measure"]
    sign = -1.0 if MEASURES[measure].lower_is_better else 1.0
    found = []
    for pair in comparison["pairs"]:
        difference = pair["differences"][measure]
        low, high = sorted(sign * end for end in difference["ci95"])
        found.append({**pair, "at": sign * difference["difference"], "low": low, "high": high})
    left, right = (
        min(0.0, *(one["low"] for one in found)),
        max(0.0, *(one["high"] for one in found)),
    )
    width = (right - left) or 1.0
    for one in found:
        one |= {name: 100 * (one[name] - left) / width for name in ("at", "low", "high")} | {
            "zero": -100 * left / width
        }
    return found


def _models(
    comparison: Mapping[str, Any], best_first: Entrants
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Who can be looked at closely, the best last: which measurement of which evaluation."""
    models: dict[str, tuple[str, Mapping[str, Any]]] = {
        name: ("after", runs[0].evaluation) for name, runs in reversed(best_first.items())
    }
    if UNTOUCHED not in comparison["methods"] or not models:
        return models
    return {UNTOUCHED: ("before", next(iter(best_first.values()))[0].evaluation), **models}


def _answers(
    comparison: Mapping[str, Any], best_first: Entrants, untouched: Answers | None
) -> SideBySide:
    """The teacher's answers and each student's, where all were asked the same; of the first seed."""
    columns = {name: runs[0].answers() or [] for name, runs in best_first.items()}
    if not comparison["answers"] or not columns:
        return SideBySide([], [])
    first = next(iter(columns.values()))
    given = {"Teacher": [row["teacher"] for row in first]}
    for name, answered in {
        **({UNTOUCHED: untouched} if untouched else {}),
        **dict(reversed(columns.items())),
    }.items():
        given[name] = [row["messages"][-1]["content"] for row in answered]
    return side_by_side([row["prompt"] for row in first], given)


def _run(name: str, run: FinishedRun, folder: Path) -> dict[str, str]:
    """Of one run what a reader can check it by, and the way to its own report."""
    rows = RunFolder(run.folder).read_metrics()[0]
    last = rows[-1] if rows else {}
    tokens, seconds = number(last.get("tokens")), number(last.get("seconds"))
    report = run.folder / "report.html"
    return {
        "name": name,
        "seed": str(run.seed),
        "steps": str(run.config.get("max_steps", "–")),
        "tokens": "–" if tokens is None else plural(tokens, "token"),
        "time": "–" if seconds is None else duration(seconds),
        "report": quote(Path(os.path.relpath(report, folder)).as_posix())
        if report.is_file()
        else "",
    }
