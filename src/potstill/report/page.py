"""A run folder → one HTML page that explains the run and opens offline.

    potstill report runs/demo        # writes runs/demo/report.html

Whatever a model wrote is shown as text: Jinja2 escapes it, `printable` shows what cannot be printed, and the page's content
security policy forbids every request and every script but its own. The page is made from what is there, and says what is missing.
"""

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from potstill.errors import RunFolderError
from potstill.report.answers import side_by_side
from potstill.report.curves import Curve, panels
from potstill.report.formatting import objects
from potstill.report.template import render
from potstill.report.token_view import run_views, worst_prompts, worst_tokens
from potstill.report.verdict import deciding_measure, interval, measure_rows, story, verdict
from potstill.run_folder import RunFolder

NAMES = {"teacher": "Teacher", "before": "Student before", "after": "Student after"}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, one self-contained page, and return its path.

    Needs `config.yaml`. A run that goes on or was interrupted has no `evaluation.json` or `metrics.jsonl`: the page
    says so. The page appears whole or not at all.

    Raises:
        RunFolderError: the folder is not a run, a file in it is damaged, or the page cannot be written.
    """
    run = RunFolder(run_dir)
    if (run.path / "comparison.json").is_file():
        raise RunFolderError(
            f"{run.path}: holds a comparison, whose page is comparison.html; name the folder of one of its runs"
        )
    config = run.read_config()
    evaluation = run.read_evaluation() if run.evaluation.is_file() else None
    metrics, unreadable_rows = run.read_metrics()
    measured = evaluation or {}
    samples = objects(measured.get("samples"))
    unit, worst = worst_prompts({"Before": ("before", measured), "After": ("after", measured)})
    page = render(
        "report.html.j2",
        teacher=config.get("teacher") or "a teacher",
        settings=settings_rows(config),
        verdict=verdict(evaluation),
        story=story(config, evaluation, metrics),
        evaluation=evaluation,
        scale=_scale(measured),
        measures=measure_rows(measured),
        panels=panels([Curve("", 0, config, metrics)]),
        unreadable_rows=unreadable_rows,
        answers=side_by_side(
            [row.get("prompt") for row in samples],
            {name: [row.get(key) for row in samples] for key, name in NAMES.items()},
        ),
        views=run_views(measured),
        worst_tokens=worst_tokens(measured),
        worst_prompts=worst,
        worst_unit=unit,
        command=_command(run_dir),
    )
    return write_page(run.path / "report.html", page)


def write_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all. Raises: RunFolderError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written ({error.strerror}); make the folder writable"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def settings_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting as config.yaml has it."""
    return [(str(key), _yaml_text(value)) for key, value in config.items()]


def _yaml_text(value: object) -> str:
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _scale(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Before and after as places on the way to the teacher, 0 to 100, for a line under the verdict; only where KL is known."""
    key, before, after = deciding_measure(evaluation)
    if key != "kl_nats_per_token" or not before or after is None:
        return []
    right = max(
        before,
        after,
        *(ends[1] for when in ("before", "after") if (ends := interval(evaluation, when, key))),
    )
    marks = [{"name": "teacher", "at": 0.0, "low": 0.0, "high": 0.0, "value": 0.0}]
    for when, value in (("after", after), ("before", before)):
        low, high = interval(evaluation, when, key) or (value, value)
        marks.append(
            {
                "name": when,
                "value": value,
                **{k: 100 * v / right for k, v in (("at", value), ("low", low), ("high", high))},
            }
        )
    return marks


def _command(run_dir: Path) -> str:
    """What to type to run it again, into a new folder beside this one."""
    again = os.path.normpath(run_dir / ".." / f"{run_dir.resolve().name}-again")
    return f"potstill distill --config {shlex.quote(str(run_dir / 'config.yaml'))} --output-dir {shlex.quote(again)}"
