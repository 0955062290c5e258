"""A run folder → one HTML page that explains the run, opens offline and runs no script.

    potstill report runs/demo        # writes runs/demo/report.html

Whatever a model wrote is shown as text: Jinja2 escapes it, `_printable` shows what cannot be printed, and the page's
content security policy forbids every request. The page is made from what is there, and says what is missing.
"""

import io
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml

from potstill.errors import RunFolderError

Points = list[tuple[float, float]]
MEASURES = (  # key, name, unit, what is better, the teacher's value where it follows from the definition
    ("kl_nats_per_token", "Divergence from the teacher", "KL, nats a token", "lower", 0.0),
    ("nll_nats_per_token", "Surprise at the text", "nats a token", "lower", None),
    ("bits_per_byte", "Compression of the text", "bits a byte", "lower", None),
    ("top1_agreement", "Same most likely token", "share of tokens", "higher", 1.0),
)
METHODS = {
    "text": "by imitating what {} wrote",
    "logits": "by matching the next-token distribution of {}",
    "cross": "by matching the next-token distribution of {} across two tokenizers",
}
KL_STEPS_NATS = (0.03, 0.1, 0.3, 1.0, 3.0)  # fixed, so that two reports can be laid side by side
MOST_POINTS = 1000  # of a curve
INK, ACCENT = "#010203", "#040506"  # stand-ins in the drawing for the page's own colours, light or dark
UNWANTED_SVG = r'^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"| (?:width|height)="\S+pt"'
MARKS = {ord(" "): "·", ord("\t"): "⇥", ord("\n"): "⏎", ord("\r"): "␍", 0xA0: "⍽"}  # white space in a token, shown

# Control characters become their pictures (␀, ␛, …); lone surrogates, which UTF-8 cannot hold, become U+FFFD.
_UNPRINTABLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {0x7F: 0x2421}
_UNPRINTABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, one self-contained page, and return its path.

    Needs `config.yaml`. A run that goes on or was interrupted has no `evaluation.json` or `metrics.jsonl`: the page
    says so. The page appears whole or not at all.

    Raises:
        RunFolderError: the folder is not a run, a file in it is damaged, or the page cannot be written.
    """
    config = _read_config(run_dir)
    evaluation = _read_evaluation(run_dir)
    metrics, unreadable_rows = _read_metrics(run_dir)
    page = _template().render(
        teacher=config.get("teacher") or "a teacher",
        settings=[(str(key), _yaml_text(value)) for key, value in config.items()],
        verdict=_verdict(evaluation),
        story=_story(config, evaluation, metrics),
        evaluation=evaluation,
        measures=_measure_rows(evaluation or {}),
        curves=_curves(metrics),
        unreadable_rows=unreadable_rows,
        samples=_objects((evaluation or {}).get("samples")),
        token_view=_token_view(evaluation or {}),
        kl_steps=KL_STEPS_NATS,
        command=_command(run_dir, config),
    )
    path, unfinished = run_dir / "report.html", run_dir / f".report.html.{os.getpid()}"
    try:
        unfinished.write_text(page, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written ({error.strerror}); make the folder writable") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _read_config(run_dir: Path) -> dict[object, Any]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RunFolderError(f"{run_dir} has no config.yaml; name a folder that `potstill distill` or `demo` wrote")
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise RunFolderError(f"{path} is not valid YAML; mend it by hand, or run again into a new folder") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path} holds no mapping of settings; mend it by hand, or run again into a new folder")
    return config


def _read_evaluation(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return None
    try:
        evaluation = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is not valid JSON; delete it and evaluate the student again") from error
    if not isinstance(evaluation, dict):
        raise RunFolderError(f"{path} holds no JSON object; delete it and evaluate the student again")
    return evaluation


def _read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """The logged rows, and how many lines were not one: a run that was cut off leaves half a line."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return [], 0
    rows, unreadable = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, finalize=_printable, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("potstill.report").joinpath("report.html.j2").read_text(encoding="utf-8"))


def _printable(value: object) -> object:
    """What a model wrote, without characters that would break or silently vanish from the page."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    return value.replace("\r\n", "\n").translate(_UNPRINTABLE)


def _number(value: object) -> float | None:
    """A finite number, or None for anything else (null, NaN, a word)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _of(evaluation: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    row = evaluation.get(model)
    return row if isinstance(row, dict) else {}


def _interval(evaluation: Mapping[str, Any], model: str, key: str) -> tuple[float, float] | None:
    intervals = _of(evaluation, model).get("ci95")
    ends = intervals.get(key) if isinstance(intervals, dict) else None
    low, high = map(_number, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _figure(value: float, key: str = "") -> str:
    """A number as the page prints it: a share in per cent, small values with two significant digits."""
    if key == "top1_agreement":
        return f"{100 * value:.1f}\u00a0%"
    return (f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}").replace("-", "\u2212", 1)


def _deciding_measure(evaluation: Mapping[str, Any]) -> tuple[str, float | None, float | None]:
    """KL before and after where it is defined, else (two tokenizers) bits a byte; None for what was not measured."""
    for key in ("kl_nats_per_token", "bits_per_byte"):
        before, after = _number(_of(evaluation, "before").get(key)), _number(_of(evaluation, "after").get(key))
        if before is not None and after is not None:
            break
    return key, before, after


def _verdict(evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    """Did it help? One plain sentence, and a second one with the reason for any doubt."""
    if evaluation is None:
        missing = "This folder has no evaluation.json: the run is still going on, or it was interrupted."
        return {"tone": "open", "headline": "Not measured yet.", "doubt": missing}
    key, before, after = _deciding_measure(evaluation)
    if before is None or after is None:
        missing = "The evaluation lacks both the divergence and the bits a byte, before training or after it."
        return {"tone": "open", "headline": "The measurement is incomplete.", "doubt": missing}
    was, now = _interval(evaluation, "before", key), _interval(evaluation, "after", key)
    certain, doubt = False, "No 95 % intervals were measured, so chance cannot be ruled out."
    if was and now:
        certain = now[1] < was[0] or was[1] < now[0]
        doubt = "" if certain else "The 95 % intervals of before and after overlap: the difference may be chance."
    closer = "closer to its teacher" if key == "kl_nats_per_token" else "better at predicting the held-out text"
    if after >= before:
        headline, tone = f"It did not help: the student is no {closer} than before.", "bad"
    elif certain:
        headline, tone = f"It helped: the student is {closer} than before.", "good"
    else:
        headline, tone = f"Perhaps it helped: the student measures {closer} than before, but not certainly.", "open"
    return {"tone": tone, "headline": headline, "doubt": doubt}


def _story(config: Mapping[object, Any], evaluation: Mapping[str, Any] | None, metrics: list[dict[str, Any]]) -> str:
    """What was done and what came of it, in two sentences; whatever the files do not tell is left out."""
    teacher = f"“{config['teacher']}”" if config.get("teacher") else "its teacher"
    student = f"The student “{config['student']}”" if config.get("student") else "The student"
    method = METHODS.get(str(config.get("method")), "from {}").format(teacher)
    steps, planned = max((_number(row.get("step")) or 0 for row in metrics), default=0), config.get("max_steps")
    length = f" for {_plural(steps, 'step')}" if steps else ""
    if evaluation is None and steps and planned:
        length = f" for {steps:.0f} of at most {planned} steps so far"
    seconds = max((_number(row.get("seconds")) or 0 for row in metrics), default=0)
    length += f" ({_duration(seconds)})" if seconds else ""
    if conversations := _number((evaluation or config).get("train_conversations", config.get("train_conversations"))):
        length += f" on {_plural(conversations, 'conversation')}"
    done = f"{student} {'was trained' if steps or evaluation is not None else 'is to be trained'}{length} {method}."
    return done if evaluation is None else f"{done} {_outcome(evaluation)}".strip()


def _outcome(evaluation: Mapping[str, Any]) -> str:
    key, before, after = _deciding_measure(evaluation)
    if before is None or after is None:
        return ""
    conversations = _number(evaluation.get("eval_conversations"))
    where = f"On {_plural(conversations, 'held-out conversation')}" if conversations else "On held-out text"
    change = f"went from {_figure(before)} to {_figure(after)}"
    sentence = f"{where}, its cost {change} bits a byte"
    if key == "kl_nats_per_token":
        sentence = f"{where}, its divergence from the teacher {change} nats a token"
    gap = _number(evaluation.get("gap_closed"))
    if gap is None:
        return sentence + "."
    if gap < 0:
        return f"{sentence}: the gap to the teacher grew by {-100 * gap:.0f}\u00a0%."
    return f"{sentence}, which closes {100 * gap:.0f}\u00a0% of the gap to the teacher."


def _plural(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}".replace(",", "\u202f")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _measure_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table: a row a measure, a cell a model, each with its figure and interval where there is one."""
    rows = []
    for key, name, unit, better, of_teacher in MEASURES:
        cells: list[tuple[str, list[str], str]] = []
        for model in ("before", "after", "teacher"):
            if model == "teacher" and of_teacher is not None:
                cells.append((_figure(of_teacher, key), [], "by definition"))
                continue
            value, ends = _number(_of(evaluation, model).get(key)), _interval(evaluation, model, key) or ()
            note = "not measured" if value is None else ""
            cells.append(("" if value is None else _figure(value, key), [_figure(end, key) for end in ends], note))
        rows.append({"name": name, "unit": unit, "better": better, "cells": cells})
    return rows


def _curves(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The loss over steps and over time, as drawings in the page's colours; empty if no loss was logged."""
    curves = []
    for x_key, width in (("step", 4.6), ("seconds", 3.1)):
        losses, held_out = _points(metrics, x_key, "loss"), _points(metrics, x_key, "eval_loss")
        if not losses:
            continue
        (first_x, first), (last_x, last) = losses[0], losses[-1]
        caption = f"Loss, nats a supervised token: {_figure(first)} at {x_key.rstrip('s')} {first_x:.0f}, "
        caption += f"{_figure(last)} at {last_x:.0f}.{' Dashed: the loss on held-out text.' if held_out else ''}"
        curves.append({"svg": _draw(x_key, width, losses, held_out), "caption": caption})
    return curves


def _points(metrics: list[dict[str, Any]], x_key: str, y_key: str) -> Points:
    """The rows that have both numbers, thinned evenly to at most `MOST_POINTS`; the last one is always there."""
    pairs = [(_number(row.get(x_key)), _number(row.get(y_key))) for row in metrics]
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    return points[::-1][:: math.ceil(len(points) / MOST_POINTS) or 1][::-1]


def _draw(x_label: str, width: float, losses: Points, held_out: Points) -> markupsafe.Markup:
    import matplotlib  # only here: a run without a report should not wait for it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    look: Any = {"svg.fonttype": "none", "svg.hashsalt": x_label, "font.size": 8.5, **dict.fromkeys(coloured, INK)}
    drawing = io.StringIO()
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(width, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*losses, strict=True), color=ACCENT, linewidth=1.6, marker="o" if len(losses) == 1 else "")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=INK, linewidth=1.1, linestyle="--")
        axes.set(xlabel=x_label, ylabel="nats a token" if x_label == "step" else "")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_linewidth(0.6)
        axes.tick_params(width=0.6)
        axes.grid(axis="y", color=INK, alpha=0.13, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(UNWANTED_SVG, "", drawing.getvalue(), flags=re.DOTALL).replace("<svg", '<svg aria-hidden="true"', 1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", svg)
    svg = svg.replace(INK, "currentColor").replace(ACCENT, "var(--accent)")
    return markupsafe.Markup(svg)  # our own drawing; no text of a model is in it


def _objects(rows: object) -> list[dict[str, Any]]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _token_view(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    view = evaluation.get("token_view")
    tokens = []
    for row in _objects(view.get("tokens")) if isinstance(view, dict) else []:
        text = str(row.get("text", ""))
        token: dict[str, Any] = {"text": text.translate(MARKS) or "∅", "breaks": "\n" in text}
        for model in ("before", "after"):
            nats = _number(row.get(f"{model}_kl_nats"))
            level = None if nats is None else sum(nats >= step for step in KL_STEPS_NATS)
            token[model] = {"nats": "not measured" if nats is None else f"{_figure(nats)} nats", "level": level}
        tokens.append(token)
    return {"prompt": str(view.get("prompt", "")), "tokens": tokens} if isinstance(view, dict) and tokens else None


def _yaml_text(value: object) -> str:
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _command(run_dir: Path, config: Mapping[object, Any]) -> str:
    """What to type to run it again, into a new folder beside this one."""
    again = f"--output-dir {shlex.quote(os.path.normpath(run_dir / '..' / f'{run_dir.resolve().name}-again'))}"
    if config.get("command") == "demo":
        seconds = f" --seconds {config['seconds']}" if _number(config.get("seconds")) else ""
        return f"potstill demo {again}{seconds}"
    return f"potstill distill --config {shlex.quote(str(run_dir / 'config.yaml'))} {again}"
