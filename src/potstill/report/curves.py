"""The loss during training, over tokens and over seconds, drawn by Matplotlib in the page's own colours, light or dark.

Runs share a drawing only where their losses are the same quantity on the same text: a divergence and a cross-entropy on one axis
would compare nothing.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import markupsafe
import numpy as np

from potstill.report.formatting import figure, number

Points = list[tuple[float, float]]
MOST_POINTS = 600  # of a curve
SMOOTHED_SHARE, FEWEST_SMOOTHED = 1 / 20, 5  # of a curve's points, in the running median
LABEL_GAP = 0.075  # of the drawing's height, between the names at the ends of two curves
INK = "#010203"  # stand-ins in the drawing for the page's own colours
COLOURS = tuple(f"#0405{n:02x}" for n in range(6, 12))
UNWANTED_SVG = r'^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"| (?:width|height)="\S+pt"'
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
    """One run's loss: what stands at its end, whose colour it has, its settings and its logged rows."""

    name: str
    colour: int
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """The curves of one quantity: its name, a drawing for each axis, and in words what they show."""

    quantity: str
    drawings: list[markupsafe.Markup]
    caption: str


def panels(curves: Sequence[Curve]) -> list[Panel]:
    """A panel for each quantity, in order of appearance; none for a run that has logged no loss."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        if _points(curve.rows, "step", "loss"):
            groups.setdefault((quantity(curve.config), str(curve.config.get("data"))), []).append(
                curve
            )
    return [_panel(name, group) for (name, _), group in groups.items()]


def quantity(config: Mapping[str, Any]) -> str:
    """What a run's loss measures, from its settings.

    >>> quantity({"method": "logits", "divergence": "reverse_kl", "temperature": 2.0})
    'KL(student ‖ teacher) at temperature 2'
    """
    if config.get("method") == "text":
        return "−log p of the text"
    name = DIVERGENCES.get(
        str(config.get("divergence", "forward_kl")), str(config.get("divergence"))
    )
    if config.get("method") == "cross":
        return f"{name} across tokenizers, by {config.get('alignment')}"
    temperature, hard = number(config.get("temperature")), number(config.get("hard_label_weight"))
    name += f" at temperature {temperature:g}" if temperature not in (None, 1.0) else ""
    return name + (f", {100 * hard:g} % cross-entropy mixed in" if hard else "")


def _panel(name: str, curves: list[Curve]) -> Panel:
    axes = [
        "tokens" if any(_points(curve.rows, "tokens", "loss") for curve in curves) else "step",
        "seconds",
    ]
    said, seen, held_out = [], set(), False
    for curve in curves:
        losses = _points(curve.rows, "step", "loss")
        held_out |= bool(_points(curve.rows, "step", "eval_loss"))
        if curve.name not in seen:
            subject = f"{curve.name}: " if curve.name else ""
            said.append(
                f"{subject}{figure(losses[0][1])} at first, {figure(losses[-1][1])} at step {losses[-1][0]:.0f}"
            )
        seen.add(curve.name)
    caption = f"{'; '.join(said)}. Thin: each logged step; bold: their running median."
    caption += " Dashed: the loss on held-out text." if held_out else ""
    return Panel(
        name,
        [_draw(x, curves) for x in axes if any(_points(curve.rows, x, "loss") for curve in curves)],
        caption,
    )


def _points(rows: list[dict[str, Any]], x_key: str, y_key: str) -> Points:
    pairs = [(number(row.get(x_key)), number(row.get(y_key))) for row in rows]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _thinned(points: Points) -> Points:
    """Evenly, to at most `MOST_POINTS`; the last one is always there."""
    return points[::-1][:: math.ceil(len(points) / MOST_POINTS) or 1][::-1]


def _smoothed(points: Points) -> Points:
    """The running median over the points on both sides, fewer near the ends: a single hard batch leaves no trace."""
    window = max(len(points) * SMOOTHED_SHARE, FEWEST_SMOOTHED)
    reach, losses = int(window / 2), np.asarray([y for _, y in points])
    smooth = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        smooth.append((x, float(np.median(losses[i - near : i + near + 1]))))
    return smooth


def _draw(x_key: str, curves: list[Curve]) -> markupsafe.Markup:
    import matplotlib  # only here: a run without a report should not wait for it
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    look: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": x_key,
        "font.size": 9,
        **dict.fromkeys(coloured, INK),
    }
    longest = max(
        (row[0] for curve in curves for row in _points(curve.rows, x_key, "loss")), default=0
    )
    unit, scale = _time_unit(longest) if x_key == "seconds" else (x_key, 1.0)
    drawing = io.StringIO()
    with matplotlib.rc_context(look):
        page = Figure(figsize=(4.3, 2.5), layout="constrained")
        axes = page.subplots()
        ends = []
        for curve in curves:
            ends.append((curve, _plot(axes, curve, x_key, scale)))
        _name_ends(axes, [(curve, end) for curve, end in ends if end and curve.name])
        axes.set(xlabel=unit, ylabel="nats a token")
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
    svg = re.sub(UNWANTED_SVG, "", drawing.getvalue(), flags=re.DOTALL).replace(
        "<svg", '<svg aria-hidden="true"', 1
    )
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", svg).replace(
        INK, "currentColor"
    )
    for place, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{place})")
    return markupsafe.Markup(svg)  # Matplotlib has escaped the names that are in it


def _time_unit(longest: float) -> tuple[str, float]:
    if longest > 3 * 3600:
        return "hours", 1 / 3600
    return ("minutes", 1 / 60) if longest > 600 else ("seconds", 1.0)


def _plot(axes: Any, curve: Curve, x_key: str, scale: float) -> tuple[float, float] | None:
    """One run's curve; where it ends."""
    losses, held_out = _points(curve.rows, x_key, "loss"), _points(curve.rows, x_key, "eval_loss")
    if not losses:
        return None
    colour, dashes = (
        COLOURS[curve.colour % len(COLOURS)],
        "-" if curve.colour < len(COLOURS) else (0, (5, 1.5)),
    )
    smooth = [(x * scale, y) for x, y in _thinned(_smoothed(losses))]
    axes.plot(
        [x * scale for x, _ in _thinned(losses)],
        [y for _, y in _thinned(losses)],
        color=colour,
        linewidth=0.5,
        alpha=0.4,
    )
    marker = "o" if len(losses) == 1 else ""
    axes.plot(
        *zip(*smooth, strict=True), color=colour, linewidth=1.7, linestyle=dashes, marker=marker
    )
    if held_out:
        axes.plot(
            [x * scale for x, _ in held_out],
            [y for _, y in held_out],
            color=INK,
            linewidth=1.1,
            linestyle="--",
        )
    return smooth[-1]


def _name_ends(axes: Any, ends: list[tuple[Curve, tuple[float, float]]]) -> None:
    """Each curve's name at its end, once a name, the names pushed apart where curves end together."""
    low, high = axes.get_ylim()
    gap, previous, named = LABEL_GAP * (high - low), -math.inf, set()
    for curve, (_, y) in sorted(ends, key=lambda end: end[1][1]):
        if curve.name in named:
            continue
        named.add(curve.name)
        previous = max(y, previous + gap)
        name = curve.name if len(curve.name) <= 14 else f"…{curve.name[-13:]}"
        axes.text(
            1.02, previous, name, color=COLOURS[curve.colour % len(COLOURS)], va="center",
            transform=axes.get_yaxis_transform(), parse_math=False, clip_on=False,
        )  # fmt: skip
    axes.set_ylim(low, max(high, previous + gap / 2) if named else high)
