"""Is one method better than another, by how much, and is that more than chance?

S seeds, C conversations. Two students that are measured on the same conversations find the same ones hard, and two that are trained
with the same seed saw the same order of data. So the difference is taken conversation by conversation and seed by seed: what both
have in common falls out, and an interval of the difference is far narrower than the two intervals look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation.measures import Measure

RESAMPLES = 2000
FEWEST_CONVERSATIONS = 10
"""With fewer, resampling says little: the interval of a handful is much too narrow."""


@dataclass(frozen=True)
class Ratios:
    """One measure of one method: what is divided by what, float64 ``[S, C]`` each; its value is Σ/Σ over C, averaged over S."""

    numerator: Any
    denominator: Any

    @property
    def value(self) -> float:
        """The measure itself."""
        return float((self.numerator.sum(1) / self.denominator.sum(1)).mean())

    def per_conversation(self) -> Any:
        """The measure in each conversation, over all seeds ``[C]``; NaN where there is nothing to divide by (no bytes)."""
        above, below = self.numerator.sum(0), self.denominator.sum(0)
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


@dataclass(frozen=True)
class Difference:
    """One method's measure minus another's, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    conversations: int

    @property
    def certain(self) -> bool:
        """Whether the interval excludes 0, on conversations enough to have one."""
        return self.conversations >= FEWEST_CONVERSATIONS and (self.low > 0 or self.high < 0)

    @property
    def half_width(self) -> float:
        """What stands behind ±."""
        return (self.high - self.low) / 2


def paired_difference(one: Ratios, other: Ratios, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """``one`` − ``other``, with a 95 % percentile interval from resampling conversations and seeds, the same for both.

    With one seed the interval speaks of other conversations only. With several, rows and columns are resampled independently of one
    another, which for an effect of both is, if anything, too wide; of two or three seeds it cannot know more than these show.

    Raises: ValueError if the two are not of the same seeds and conversations.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; Owen 2007, The Pigeonhole Bootstrap.

    >>> easy_and_hard = np.array([[1.0, 100.0] * 8])
    >>> difference = paired_difference(Ratios(easy_and_hard + 1, np.ones((1, 16))), Ratios(easy_and_hard, np.ones((1, 16))))
    >>> round(difference.value, 6), round(difference.half_width, 6), difference.certain
    (1.0, 0.0, True)
    """
    if one.numerator.shape != other.numerator.shape:
        raise ValueError(f"not pairs: {one.numerator.shape} seeds and conversations against {other.numerator.shape}")
    low, high = _ends(lambda drawn: _resampled(one, drawn) - _resampled(other, drawn), one.numerator.shape, resamples, seed)
    return Difference(one.value - other.value, low, high, one.numerator.shape[1])


def interval(ratios: Ratios, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of one measure by itself, from the same resampling."""
    return _ends(lambda drawn: _resampled(ratios, drawn), ratios.numerator.shape, resamples, seed)


def _ends(measured: Callable[[Any], Any], shape: tuple[int, int], resamples: int, seed: int) -> tuple[float, float]:
    seeds, conversations = shape
    random = np.random.default_rng(seed)
    drawn = random.multinomial(conversations, np.full(conversations, 1 / conversations), size=resamples)
    drawn_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    low, high = np.percentile((measured(drawn) * drawn_seeds).sum(1), [2.5, 97.5])
    return float(low), float(high)


def _resampled(ratios: Ratios, drawn: Any) -> Any:
    """The measure of each seed on each resample ``[R, S]``, where ``drawn`` ``[R, C]`` says how often a conversation was drawn."""
    return (drawn @ ratios.numerator.T) / (drawn @ ratios.denominator.T)


def verdict(one: str, other: str, difference: Difference, measure: Measure) -> str:
    """In plain words, the better one first.

    >>> kl = Measure("KL", "Divergence from the teacher", "nats a token", "lower")
    >>> verdict("logits", "text", Difference(-0.21, -0.24, -0.18, 60), kl)
    'logits better than text by 0.210 ± 0.030 nats a token'
    >>> verdict("logits", "text", Difference(-0.01, -0.04, 0.02, 60), kl)
    'no difference seen between logits and text (0.010 ± 0.030 nats a token)'
    """
    size = f"{_figure(abs(difference.value))} ± {_figure(difference.half_width)} {measure.unit}"
    if difference.conversations < FEWEST_CONVERSATIONS:
        return (
            f"too few held-out conversations to tell {one} from {other} ({difference.conversations}; "
            f"{FEWEST_CONVERSATIONS} are needed)"
        )
    if not difference.certain:
        return f"no difference seen between {one} and {other} ({size})"
    if (difference.value > 0) == measure.lower_is_better:
        one, other = other, one
    return f"{one} better than {other} by {size}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if value == 0 or value >= 0.01 else f"{value:.1g}"


def regressions(before: Ratios, after: Ratios, measure: Measure) -> list[tuple[int, float, float]]:
    """The conversations on which ``after`` is worse than ``before``: number, before, after; the worst first."""
    was, now = before.per_conversation(), after.per_conversation()
    worse = (now - was) if measure.lower_is_better else (was - now)
    return [(int(i), float(was[i]), float(now[i])) for i in np.argsort(-worse, kind="stable") if worse[i] > 0]
