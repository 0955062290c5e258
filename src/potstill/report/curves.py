"""Plot the loss during training, over tokens and over seconds, with Matplotlib.

Runs share a plot only if their losses are the same quantity on the same text: a divergence and a
cross-entropy cannot be compared. The plots use the page's own colors, light or dark.
"""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import markupsafe
import numpy as np

from potstill.report.formatting import figure, number

Points = list[tuple[float, float]]
MAX_POINTS = 600  # of a curve
SMOOTHED_SHARE, MIN_SMOOTHED = 1 / 20, 5  # window of the running median, as share and as points
LABEL_GAP = 0.075  # minimum distance of two curve labels, as a share of the plot's height
INK = "#010203"  # placeholder; the page's text color replaces it
COLORS = tuple(f"#0405{n:02x}" for n in range(6, 12))  # placeholders of the page's curve colors
UNWANTED_SVG = (
    r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>"
    r'|(?<=<g) id="[^"]*"| (?:width|height)="\S+pt"'
)
DIVERGENCES = {
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "jensen_shannon": "Jensen–Shannon divergence",
    "skew_forward_kl": "skewed KL(teacher ‖ student)",
    "skew_reverse_kl": "skewed KL(student ‖ teacher)",
    "total_variation": "total variation",
}


@dataclass(frozen=True)
class Curve:
    """The loss of one run: label, index of its color, settings and logged rows."""

    name: str
    color: int
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    quantity: str = ""
    """What the rows' loss is, if it does not follow from the settings."""
    unit: str = "nats per token"


ROLLOUTS = {
    "rollout_ended": ("The student's own answers: those that end", "share of a round"),
    "rollout_tokens": ("The student's own answers: length", "tokens an answer"),
    "rollout_repeated": ("The student's own answers: repetition", "share of 4-grams"),
    "rollout_entropy": ("The student's own answers: entropy", "nats per token"),
}
"""What an on-policy run logs for every round, and its unit."""


@dataclass(frozen=True)
class Panel:
    """The curves of one quantity: its name, one SVG per x-axis, and a caption."""

    quantity: str
    drawings: list[markupsafe.Markup]
    caption: str
    of: str = "per supervised token of the training text"


def panels(curves: Sequence[Curve]) -> list[Panel]:
    """Return one panel per quantity; runs without a logged loss are left out."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in itertools.chain.from_iterable(map(_by_text, curves)):
        if _points(curve.rows, "step", "loss"):
            key = curve.quantity or quantity(curve.config), str(curve.config.get("data"))
            groups.setdefault(key, []).append(curve)
    return [_panel(name, group) for (name, _), group in groups.items()]


def _by_text(curve: Curve) -> list[Curve]:
    """Return the curves of a run: on-policy, one for each kind of text and of measure.

    The two losses of an on-policy run are different quantities on different text.
    """
    if not number(curve.config.get("on_policy")):
        return [curve]

    def rows_of(name: str, *dropped: str) -> list[dict[str, Any]]:
        kept = [row for row in curve.rows if name in row or "eval_loss" in row]
        return [
            {key: value for key, value in row.items() if key not in ("loss", *dropped)}
            | ({"loss": row[name]} if name in row else {})
            for row in kept
        ]

    own = {**curve.config, "divergence": curve.config.get("on_policy_divergence")}
    on_text = f"{quantity({**own, 'hard_label_weight': 0.0})}, on the student's own answers"
    found = [
        dataclasses.replace(curve, rows=rows_of("off_policy_loss")),
        dataclasses.replace(curve, rows=rows_of("on_policy_loss", "eval_loss"), quantity=on_text),
    ]
    for name, (title, unit) in ROLLOUTS.items():
        rows = rows_of(name, "eval_loss", "seconds")
        found.append(dataclasses.replace(curve, rows=rows, quantity=title, unit=unit))
    return found


def quantity(config: Mapping[str, Any]) -> str:
    """Return the name of a run's loss, from its settings.

    >>> quantity({"method": "logits", "divergence": "reverse_kl", "temperature": 2.0})
    'KL(student ‖ teacher) at temperature 2'
    """
    if config.get("method") == "text":
        return "−log p of the text"
    divergence = config.get("divergence")
    name = DIVERGENCES.get(str(config.get("divergence", "forward_kl")), str(divergence))
    if config.get("method") == "cross":
        return f"{name} across tokenizers, by {config.get('alignment')}"
    temperature, hard = number(config.get("temperature")), number(config.get("hard_label_weight"))
    name += f" at temperature {temperature:g}" if temperature not in (None, 1.0) else ""
    return name + (f", {100 * hard:g} % cross-entropy mixed in" if hard else "")


def _panel(name: str, curves: list[Curve]) -> Panel:
    def has(key: str) -> bool:
        return any(_points(curve.rows, key, "loss") for curve in curves)

    ends: dict[str, str] = {}  # of the first run of each name
    for curve in curves:
        losses = _points(curve.rows, "step", "loss")
        first, (step, last) = losses[0][1], losses[-1]
        subject = f"{curve.name}: " if curve.name else ""
        text = f"{subject}{figure(first)} at the start, {figure(last)} at step {step:.0f}"
        ends.setdefault(curve.name, text)
    of_rounds = name in dict(ROLLOUTS.values())
    each = "each round" if of_rounds else "each logged step"
    caption = f"{'; '.join(ends.values())}. Thin: {each}; bold: the running median."
    if any(_points(curve.rows, "step", "eval_loss") for curve in curves):
        caption += " Dashed: the loss on held-out text."
    axes = ["tokens" if has("tokens") else "step", "seconds"]
    drawings = [_draw(x, curves) for x in axes if has(x)]
    return (
        Panel(name, drawings, caption, curves[0].unit)
        if of_rounds
        else Panel(name, drawings, caption)
    )


def _points(rows: list[dict[str, Any]], x_key: str, y_key: str) -> Points:
    pairs = [(number(row.get(x_key)), number(row.get(y_key))) for row in rows]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _thinned(points: Points) -> Points:
    """Keep at most `MAX_POINTS`, evenly spaced, and always the last."""
    return points[::-1][:: math.ceil(len(points) / MAX_POINTS) or 1][::-1]


def _smoothed(points: Points) -> Points:
    """Return the running median, with a smaller window near the ends; it hides single outliers."""
    window = max(len(points) * SMOOTHED_SHARE, MIN_SMOOTHED)
    half, losses = int(window / 2), np.asarray([y for _, y in points])
    smooth = []
    for i, (x, _) in enumerate(points):
        near = min(half, i, len(points) - 1 - i)
        smooth.append((x, float(np.median(losses[i - near : i + near + 1]))))
    return smooth


def _draw(x_key: str, curves: list[Curve]) -> markupsafe.Markup:
    import matplotlib  # slow to import, and not needed without a report
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    colored = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": x_key, "font.size": 9}
    style |= dict.fromkeys(colored, INK)
    longest = max((x for curve in curves for x, _ in _points(curve.rows, x_key, "loss")), default=0)
    unit, scale = _time_unit(longest) if x_key == "seconds" else (x_key, 1.0)
    drawing = io.StringIO()
    with matplotlib.rc_context(style):
        page = Figure(figsize=(4.3, 2.5), layout="constrained")
        axes = page.subplots()
        ends = [(curve, _plot(axes, curve, x_key, scale)) for curve in curves]
        _label_ends(axes, [(curve, end) for curve, end in ends if end and curve.name])
        axes.set(xlabel=unit, ylabel=curves[0].unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_linewidth(0.6)
        axes.tick_params(width=0.6)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if x_key == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep="\u2009"))
        page.savefig(
            drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = re.sub(UNWANTED_SVG, "", drawing.getvalue(), flags=re.DOTALL)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", svg)
    svg = svg.replace(INK, "currentColor")
    for i, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--c{i})")
    return markupsafe.Markup(svg)  # safe: Matplotlib escapes the names


def _time_unit(longest: float) -> tuple[str, float]:
    if longest > 3 * 3600:
        return "hours", 1 / 3600
    return ("minutes", 1 / 60) if longest > 600 else ("seconds", 1.0)


def _plot(axes: Any, curve: Curve, x_key: str, scale: float) -> tuple[float, float] | None:
    """Plot the curve of one run; return its last point, None if there is no loss."""
    losses, held_out = (
        [(x * scale, y) for x, y in _points(curve.rows, x_key, key)]
        for key in ("loss", "eval_loss")
    )
    if not losses:
        return None
    color = COLORS[curve.color % len(COLORS)]
    dashes = "-" if curve.color < len(COLORS) else (0, (5, 1.5))
    smooth, marker = _thinned(_smoothed(losses)), "o" if len(losses) == 1 else ""
    axes.plot(*zip(*_thinned(losses), strict=True), color=color, linewidth=0.5, alpha=0.4)
    axes.plot(
        *zip(*smooth, strict=True), color=color, linewidth=1.7, linestyle=dashes, marker=marker
    )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=INK, linewidth=1.1, linestyle="--")
    return smooth[-1]


def _label_ends(axes: Any, ends: list[tuple[Curve, tuple[float, float]]]) -> None:
    """Write each name once, at the end of its curve; move labels apart if they would overlap."""
    low, high = axes.get_ylim()
    gap, previous, labeled = LABEL_GAP * (high - low), -math.inf, set()
    for curve, (_, y) in sorted(ends, key=lambda end: end[1][1]):
        if curve.name in labeled:
            continue
        labeled.add(curve.name)
        previous = max(y, previous + gap)
        name = curve.name if len(curve.name) <= 14 else f"…{curve.name[-13:]}"
        axes.text(
            1.02, previous, name, color=COLORS[curve.color % len(COLORS)], va="center",
            transform=axes.get_yaxis_transform(), parse_math=False, clip_on=False,
        )  # fmt: skip
    axes.set_ylim(low, max(high, previous + gap / 2) if labeled else high)
