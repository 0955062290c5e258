"""Lay a comparison out as a table: text for the terminal, cells for the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from potstill.evaluation import MEASURES, Measure
from potstill.report.formatting import ends, figure


def as_text(comparison: Mapping[str, Any]) -> str:
    """Return the table, a verdict per pair, and how often each method made the student worse.

    >>> methods = {"logits": {"bits_per_byte": 0.8}, "text": {"bits_per_byte": 0.9}}
    >>> pairs = [{"verdict": "logits better than text by 0.100 ± 0.020 bits per byte"}]
    >>> print(as_text({"methods": methods, "teacher": {}, "seeds": [0], "conversations": 60,
    ...     "answers": 0, "regressions": {}, "notes": [], "pairs": pairs}))
    60 held-out conversations, seed 0
    <BLANKLINE>
            bits/byte
    logits      0.800
    text        0.900
    <BLANKLINE>
    logits better than text by 0.100 ± 0.020 bits per byte
    """
    columns = [measure.short for measure in headings(comparison).values()]
    cells = [
        ["", *columns],
        *([name, *(value for value, _ in values)] for name, values in rows(comparison).items()),
    ]
    lines = [basis(comparison), *_blocks(cells)]
    lines += ["", *(pair["verdict"] for pair in comparison["pairs"])]
    for name, worse in comparison["regressions"].items():
        lines.append(f"{name}: worse than before on {100 * worse['share']:.0f} % of the prompts")
    return "\n".join([*lines, *([""] if comparison["notes"] else []), *comparison["notes"]])


_TERMINAL = 80


def _blocks(cells: list[list[str]]) -> Iterator[str]:
    """Yield the table's lines; columns that do not fit beside the others follow below them."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    blocks, used = [[0]], widths[0]
    for i, width in enumerate(widths[1:], start=1):
        used += 2 + width
        if used > _TERMINAL and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0] + 2 + width
        blocks[-1].append(i)
    for block in blocks:
        yield ""
        for row in cells:
            padded = (f"{row[i]:>{widths[i]}}" for i in block[1:])
            yield "  ".join([f"{row[0]:<{widths[0]}}", *padded]).rstrip()


def headings(comparison: Mapping[str, Any]) -> dict[str, Measure]:
    """Return the measures that at least one method has, and those of the tasks."""
    methods = comparison["methods"].values()
    tasks = {
        name: Measure(name, name, "", better)
        for name, better in comparison.get("tasks", {}).items()
    }
    return {
        name: measure
        for name, measure in MEASURES.items()
        if any(name in values for values in methods)
    } | tasks


def rows(comparison: Mapping[str, Any]) -> dict[str, list[tuple[str, list[str]]]]:
    """Return by model, teacher first, then best first: value and interval of each measure."""
    teacher = comparison["teacher"]
    models = {**({"teacher": teacher} if teacher else {}), **comparison["methods"]}
    return {
        model: [
            (shown(values.get(name), name), ends(_interval(values, name), name))
            for name in headings(comparison)
        ]
        for model, values in models.items()
    }


def shown(value: float | None, measure: str) -> str:
    """Return the printed value, or a dash if it was not measured."""
    return "–" if value is None else figure(value, measure)


def basis(comparison: Mapping[str, Any]) -> str:
    """Return in words how many conversations, answers and seeds were compared."""
    seeds, answers = comparison["seeds"], comparison["answers"]
    text = f"{comparison['conversations']} held-out conversations"
    text += f", {answers} of them answered" if answers else ""
    return f"{text}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _interval(values: Mapping[str, Any], measure: str) -> list[float]:
    interval: list[float] = (values.get("ci95") or {}).get(measure) or []
    return interval
