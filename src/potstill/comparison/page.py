"""Write a comparison as one offline HTML page (templates/comparison.html.j2)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from potstill.comparison.compare_runs import UNTOUCHED, Answers, RunsByMethod
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
    runs: RunsByMethod,
    untouched_answers: Answers | None = None,
    *,
    folder: Path = Path(),
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> str:
    """Return the page for ``folder``. Texts of models and file names are escaped."""
    best_first = {name: runs[name] for name in comparison["methods"] if name in runs}
    curves = [
        Curve(name, list(runs).index(name), run.config, RunFolder(run.folder).read_metrics()[0])
        for name, each in best_first.items()
        for run in each
    ]
    models = _models(comparison, best_first)
    unit, worst = worst_prompts(models) if models else ("", [])
    given = {name: value for name, value in (settings or {}).items() if value not in (None, "", {})}
    return render(
        "comparison.html.j2",
        package="potstill.comparison",
        verdict=verdict(comparison),
        basis=basis(comparison),
        headings=list(headings(comparison).values()),
        rows=rows(comparison),
        pairs=_pair_positions(comparison),
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
        settings=settings_rows(given),
        command=command,
    )


def verdict(comparison: Mapping[str, Any]) -> Verdict:
    """Return the best against the second, and the best method against the untouched student."""
    first = comparison["pairs"][0]
    reasons = [f"Paired over {basis(comparison)}; all with the same data, data order and budget."]
    methods = [name for name in comparison["methods"] if name != UNTOUCHED]
    for pair in comparison["pairs"][1:]:
        if methods and {pair["one"], pair["other"]} == {methods[0], UNTOUCHED}:
            reasons.insert(0, f"{_sentence(pair['verdict'])}.")
    tone = "open" if not first["certain"] else ("bad" if first["one"] == UNTOUCHED else "good")
    return Verdict(tone, f"{_sentence(first['verdict'])}.", " ".join(reasons))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _pair_positions(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each pair with the positions of its advantage and interval on an axis, 0 to 100.

    All pairs share one axis; ``zero`` is the position of no difference.
    """
    measure = comparison["measure"]
    sign = -1.0 if MEASURES[measure].lower_is_better else 1.0
    pairs = []
    for pair in comparison["pairs"]:
        difference = pair["differences"][measure]
        low, high = sorted(sign * end for end in difference["ci95"])
        pairs.append({**pair, "at": sign * difference["difference"], "low": low, "high": high})
    left = min(0.0, *(pair["low"] for pair in pairs))
    right = max(0.0, *(pair["high"] for pair in pairs))
    width = (right - left) or 1.0
    for pair in pairs:
        pair |= {name: 100 * (pair[name] - left) / width for name in ("at", "low", "high")}
        pair["zero"] = -100 * left / width
    return pairs


def _models(
    comparison: Mapping[str, Any], best_first: RunsByMethod
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return by model, best last: ``before`` or ``after``, and the evaluation that has it."""
    models: dict[str, tuple[str, Mapping[str, Any]]] = {
        name: ("after", runs[0].evaluation) for name, runs in reversed(best_first.items())
    }
    if UNTOUCHED not in comparison["methods"] or not models:
        return models
    return {UNTOUCHED: ("before", next(iter(best_first.values()))[0].evaluation), **models}


def _answers(
    comparison: Mapping[str, Any], best_first: RunsByMethod, untouched: Answers | None
) -> SideBySide:
    """Return the answers of the teacher and of each student's first seed; empty if not compared."""
    columns = {name: runs[0].answers() or [] for name, runs in best_first.items()}
    if not comparison["answers"] or not columns:
        return SideBySide([], [])
    first = next(iter(columns.values()))
    given = {"Teacher": [row["teacher"] for row in first]}
    students = {UNTOUCHED: untouched} if untouched else {}
    for name, answers in (students | dict(reversed(columns.items()))).items():
        given[name] = [row["messages"][-1]["content"] for row in answers]
    return side_by_side([row["prompt"] for row in first], given)


def _run(name: str, run: FinishedRun, folder: Path) -> dict[str, str]:
    """Return the budget that one run used, and the relative link to its report."""
    rows = RunFolder(run.folder).read_metrics()[0]
    last = rows[-1] if rows else {}
    tokens, seconds = number(last.get("tokens")), number(last.get("seconds"))
    report = run.folder / "report.html"
    link = quote(Path(os.path.relpath(report, folder)).as_posix()) if report.is_file() else ""
    return {
        "name": name,
        "seed": str(run.seed),
        "steps": str(run.config.get("max_steps", "–")),
        "tokens": "–" if tokens is None else plural(tokens, "token"),
        "time": "–" if seconds is None else duration(seconds),
        "report": link,
    }
