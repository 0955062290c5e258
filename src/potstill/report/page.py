"""Write one HTML page from a run folder; it explains the run and opens offline.

    potstill report runs/demo        # writes runs/demo/report.html

Text that a model wrote stays text: Jinja2 escapes it, `printable` replaces unprintable characters,
and the content security policy forbids requests and foreign scripts. The page uses the files that
exist, and reports which are missing.
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
from potstill.report.verdict import (
    deciding_measure,
    interval,
    measure_rows,
    quantized_teacher,
    story,
    verdict,
)
from potstill.run_folder import RunFolder

NAMES = {"teacher": "Teacher", "before": "Student before", "after": "Student after"}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, one self-contained page, and return its path.

    Needs `config.yaml`. The page reports it if `evaluation.json` or `metrics.jsonl` is missing,
    because the run has not finished. The page is written completely or not at all.

    Raises: RunFolderError if the folder is no run, a file in it is damaged, or the page cannot be
    written.
    """
    run = RunFolder(run_dir)
    if (run.path / "comparison.json").is_file():
        raise RunFolderError(
            f"{run.path}: holds a comparison, and its page is comparison.html; give the folder of "
            "one of its runs"
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
        quantized=quantized_teacher(evaluation),
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
    """Write a page completely or not at all. Raises: RunFolderError if that is impossible."""
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
    """Return names and values of all settings, formatted as in config.yaml."""
    return [(str(key), _yaml_text(value)) for key, value in config.items()]


def _yaml_text(value: object) -> str:
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _scale(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return teacher, after and before as positions on a KL axis from 0 (teacher) to 100.

    Empty if KL was not measured.
    """
    key, before, after = deciding_measure(evaluation)
    if key != "kl_nats_per_token" or not before or after is None:
        return []
    values = {"after": after, "before": before}
    ends = {
        when: interval(evaluation, when, key) or (value, value) for when, value in values.items()
    }
    right = max(*values.values(), *(high for _, high in ends.values()))
    marks: list[dict[str, Any]] = [
        {"name": "teacher", "value": 0.0, "at": 0.0, "low": 0.0, "high": 0.0}
    ]
    for when, value in values.items():
        places = zip(("at", "low", "high"), (value, *ends[when]), strict=True)
        marks.append({"name": when, "value": value, **{k: 100 * v / right for k, v in places}})
    return marks


def _command(run_dir: Path) -> str:
    """Return the command that repeats the run in a new folder beside this one."""
    again = os.path.normpath(run_dir / ".." / f"{run_dir.resolve().name}-again")
    config = str(run_dir / "config.yaml")
    return shlex.join(["potstill", "distill", "--config", config, "--output-dir", again])
