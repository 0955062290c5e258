"""Numbers and texts as the pages print them."""

import math
from collections.abc import Sequence
from typing import Any

import markupsafe

from potstill.evaluation import MEASURES

MARKS = {
    ord(" "): "·",
    ord("\t"): "⇥",
    ord("\n"): "⏎",
    ord("\r"): "␍",
    0xA0: "⍽",
}  # white space in a token, shown

# Control characters become their pictures (␀, ␛, …); lone surrogates, which UTF-8 cannot hold, become U+FFFD.
_UNPRINTABLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {0x7F: 0x2421}
_UNPRINTABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def printable(value: object) -> object:
    """What a model wrote, without characters that would break or silently vanish from the page; anything else as it is."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    return value.replace("\r\n", "\n").translate(_UNPRINTABLE)


def token_text(value: object) -> str:
    """A token with its white space marked.

    >>> token_text(" the"), token_text("")
    ('·the', '∅')
    """
    return str(printable(str(value).translate(MARKS))) or "∅"


def number(value: object) -> float | None:
    """A finite number, or None for anything else (null, NaN, a word)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def objects(rows: object) -> list[dict[str, Any]]:
    """The JSON objects of what should be a list of them."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def figure(value: float, measure: str = "") -> str:
    """A share in per cent, words and scores of 100 with one decimal, small values with two significant digits.

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
    """Both ends of an interval, the unit said once.

    >>> ends([0.5, 0.625], "top1_agreement")
    ['50.0', '62.5\\xa0%']
    """
    return [
        figure(end, measure) if place else figure(end, measure).removesuffix("\u00a0%")
        for place, end in enumerate(interval)
    ]


def plural(count: float, noun: str) -> str:
    """A whole number of something.

    >>> plural(1, "step"), plural(12000, "step")
    ('1 step', '12\\u202f000 steps')
    """
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds.

    >>> duration(59.6), duration(3660)
    ('1 min 0 s', '1 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def cut(text: object, most_bytes: int) -> tuple[str, int]:
    """The beginning of a text that takes at most so many bytes, and how many characters were left out.

    >>> cut("über", 3)
    ('üb', 2)
    """
    whole = str(printable("" if text is None else str(text)))
    kept = whole.encode()[:most_bytes].decode(errors="ignore")
    return kept, len(whole) - len(kept)
