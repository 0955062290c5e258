"""Measures of several models side by side, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.evaluation.scores import MEASURES


def as_table(measured: Mapping[str, Any]) -> str:
    """``{name: M}`` → a line a measure, and the last model's 95 % interval. What cannot be measured across tokenizers is a dash."""
    last = list(measured.values())[-1]
    lines = [f"{'':<22}" + "".join(f"{name:>10}" for name in measured) + "   95 % interval of the last"]
    for name in MEASURES:
        values = (measures[name] for measures in measured.values())
        shown = "".join(f"{'–' if value is None else f'{value:.4f}':>10}" for value in values)
        interval = last["ci95"][name]
        lines.append(f"{name:<22}{shown}   {'' if interval is None else f'{interval[0]:.4f} to {interval[1]:.4f}'}".rstrip())
    return "\n".join(lines)
