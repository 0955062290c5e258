"""Format numbers and texts for the pages."""

import math
from collections.abc import Sequence
from typing import Any

import markupsafe

from potstill.evaluation import MEASURES

MARKS = str.maketrans(" \t\n\r\xa0", "·⇥⏎␍⍽")
"""Visible symbols for the white space in a token."""

# Control characters become symbols (␀, ␛, …). UTF-8 cannot encode lone surrogates: U+FFFD.
_UNPRINTABLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {0x7F: 0x2421}
_UNPRINTABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def printable(value: object) -> object:
    """Replace unprintable characters in a text; return any other value unchanged."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    return value.replace("\r\n", "\n").translate(_UNPRINTABLE)


def token_text(value: object) -> str:
    """Return a token with visible symbols for its white space.

    >>> token_text(" the"), token_text("")
    ('·the', '∅')
    """
    return str(printable(str(value).translate(MARKS))) or "∅"


def number(value: object) -> float | None:
    """Return a finite number as float, and None for anything else (null, NaN, a word)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def objects(rows: object) -> list[dict[str, Any]]:
    """Return the JSON objects in a list; empty if ``rows`` is no list."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def figure(value: float, measure: str = "") -> str:
    """Format a value: shares in percent, scores with one decimal, small numbers with two digits.

    >>> figure(0.5, "top1_agreement"), figure(-1.23456), figure(0.00012), figure(57.23, "chrf")
    ('50.0\\xa0%', '−1.235', '0.00012', '57.2')
    """
    shown = MEASURES[measure].shown if measure in MEASURES else "number"
    if shown == "share":
        text = f"{100 * value:.1f}\u00a0%"
    elif shown == "score":
        text = f"{value:.1f}"
    else:
        text = f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"
    return text.replace("-", "\u2212", 1)


def ends(interval: Sequence[float], measure: str = "") -> list[str]:
    """Format both ends of an interval, with the percent sign only at the second.

    >>> ends([0.5, 0.625], "top1_agreement")
    ['50.0', '62.5\\xa0%']
    """
    return [
        figure(end, measure) if place else figure(end, measure).removesuffix("\u00a0%")
        for place, end in enumerate(interval)
    ]


def plural(count: float, noun: str) -> str:
    """Format a count with its noun.

    >>> plural(1, "step"), plural(12000, "step")
    ('1 step', '12\\u202f000 steps')
    """
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Format seconds as hours and minutes, minutes and seconds, or seconds.

    >>> duration(59.6), duration(3660)
    ('1 min 0 s', '1 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def cut(text: object, most_bytes: int) -> tuple[str, int]:
    """Return the beginning of a text, at most ``most_bytes``, and how many characters follow it.

    >>> cut("über", 3)
    ('üb', 2)
    """
    whole = str(printable("" if text is None else str(text)))
    kept = whole.encode()[:most_bytes].decode(errors="ignore")
    return kept, len(whole) - len(kept)
