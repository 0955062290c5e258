"""A comparison as a table for the terminal, and as one HTML page that opens offline and runs no script (comparison.html.j2)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2

from potstill.report.page import _printable as printable

COLUMNS = {  # measure: heading, unit, what is better
    "kl_nats_per_token": ("KL", "nats a token", "lower"),
    "nll_nats_per_token": ("NLL", "nats a token", "lower"),
    "bits_per_byte": ("bits/byte", "", "lower"),
    "top1_agreement": ("top-1", "same likeliest token", "higher"),
    "chrf": ("chrF", "against the teacher's answer", "higher"),
    "rouge_l": ("ROUGE-L", "against the teacher's answer", "higher"),
    "stops": ("stops", "answers that end by themselves", "higher"),
    "loops": ("loops", "answers that repeat themselves", "lower"),
    "length_words": ("words", "an answer", ""),
}
SHARES = ("top1_agreement", "stops", "loops")


def as_text(comparison: Mapping[str, Any]) -> str:
    """The table, a verdict for each pair, and how often each method made the student worse.

    >>> print(as_text({"methods": {"logits": {"bits_per_byte": 0.8}, "text": {"bits_per_byte": 0.9}}, "teacher": {}, "seeds": [0],
    ...     "conversations": 60, "answers": 0, "regressions": {}, "notes": [],
    ...     "pairs": [{"verdict": "logits better than text by 0.100 ± 0.020 bits a byte"}]}))
    60 held-out conversations, seed 0
    <BLANKLINE>
            bits/byte
    logits      0.800
    text        0.900
    <BLANKLINE>
    logits better than text by 0.100 ± 0.020 bits a byte
    """
    headings, rows = table(comparison)
    cells = [["", *(heading for heading, _, _ in headings)], *([name, *values] for name, values in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [_basis(comparison), ""]
    for first, *values in cells:
        columns = (f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
        lines.append("  ".join([f"{first:<{widths[0]}}", *columns]).rstrip())
    lines += ["", *(pair["verdict"] for pair in comparison["pairs"])]
    for name, worse in comparison["regressions"].items():
        lines.append(f"{name}: worse than before on {100 * worse['share']:.0f} % of the prompts")
    return "\n".join([*lines, *([""] if comparison["notes"] else []), *comparison["notes"]])


def as_html(comparison: Mapping[str, Any]) -> str:
    """The page. Whatever a model or a file name says is shown as text."""
    environment = jinja2.Environment(
        autoescape=True, finalize=printable, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("potstill.comparison").joinpath("comparison.html.j2").read_text(encoding="utf-8"))
    headings, rows = table(comparison)
    return template.render(
        basis=_basis(comparison),
        headings=headings,
        rows=rows,
        pairs=comparison["pairs"],
        regressions=comparison["regressions"],
        notes=comparison["notes"],
        figure=lambda value: figure(value, comparison["measure"]),
        unit=COLUMNS[comparison["measure"]][1] or "bits a byte",
    )


def table(comparison: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], list[tuple[str, list[str]]]]:
    """Headings of the measures there are, and a row a method, best first, the teacher on top."""
    methods = comparison["methods"]
    measures = [name for name in COLUMNS if any(name in values for values in methods.values())]
    teacher = comparison["teacher"]
    everybody = {**({"teacher": teacher} if teacher else {}), **methods}
    return [COLUMNS[name] for name in measures], [
        (who, [figure(values.get(name), name) for name in measures]) for who, values in everybody.items()
    ]


def figure(value: float | None, measure: str) -> str:
    """A number as it is shown: a share in per cent, words and scores of 100 with one decimal."""
    if value is None:
        return "–"
    if measure in SHARES:
        return f"{100 * value:.0f} %"
    return f"{value:.1f}" if measure in ("chrf", "rouge_l", "length_words") else f"{value:.3f}"


def _basis(comparison: Mapping[str, Any]) -> str:
    seeds, answers = comparison["seeds"], comparison["answers"]
    said = f"{comparison['conversations']} held-out conversations"
    said += f", {answers} of them answered" if answers else ""
    return f"{said}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
