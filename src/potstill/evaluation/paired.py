"""Compare two methods: is one better, by how much, and is that more than chance?

S seeds, C conversations. The difference is taken per conversation and per seed. Both methods find
the same conversations hard, and the same seed gives the same order of data, so what they have in
common cancels. The interval of the difference is much narrower than the two separate intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from potstill.evaluation.measures import Measure

RESAMPLES = 2000
FEWEST_CONVERSATIONS = 10
"""With fewer, a resampled interval is much too narrow."""


@dataclass(frozen=True)
class Ratios:
    """One measure of one method: Σ numerator / Σ denominator over C, mean over S; ``[S, C]``."""

    numerator: Any
    denominator: Any

    @property
    def value(self) -> float:
        """Return the measure."""
        return float((self.numerator.sum(1) / self.denominator.sum(1)).mean())

    def per_conversation(self) -> Any:
        """Return the measure per conversation over all seeds ``[C]``; NaN without denominator."""
        top, bottom = self.numerator.sum(0), self.denominator.sum(0)
        return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


@dataclass(frozen=True)
class Difference:
    """One method's measure minus another's, with its 95 % interval."""

    value: float
    low: float
    high: float
    conversations: int

    @property
    def certain(self) -> bool:
        """Return whether the interval excludes 0 and there are enough conversations."""
        return self.conversations >= FEWEST_CONVERSATIONS and (self.low > 0 or self.high < 0)

    @property
    def half_width(self) -> float:
        """Return the number after ±."""
        return (self.high - self.low) / 2


def paired_difference(
    one: Ratios, other: Ratios, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Return ``one`` − ``other`` with a 95 % percentile interval.

    Conversations and seeds are resampled, the same for both. One seed: the interval is about
    other conversations only. Several seeds: rows and columns are resampled independently, which
    is at most too wide; two or three seeds may not represent all.

    Raises: ValueError if the two are not of the same seeds and conversations.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; Owen 2007,
    The Pigeonhole Bootstrap.

    >>> hard, one = np.array([[1.0, 100.0] * 8]), np.ones((1, 16))
    >>> difference = paired_difference(Ratios(hard + 1, one), Ratios(hard, one))
    >>> round(difference.value, 6), round(difference.half_width, 6), difference.certain
    (1.0, 0.0, True)
    """
    shape = one.numerator.shape
    if shape != other.numerator.shape:
        found = f"{shape} seeds and conversations against {other.numerator.shape}"
        raise ValueError(f"not pairs: {found}")

    def difference(drawn: Any) -> Any:
        return _resampled(one, drawn) - _resampled(other, drawn)

    low, high = _ends(difference, shape, resamples, seed)
    return Difference(one.value - other.value, low, high, shape[1])


def interval(ratios: Ratios, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of one measure, from the same resampling."""
    return _ends(lambda drawn: _resampled(ratios, drawn), ratios.numerator.shape, resamples, seed)


def _ends(
    measured: Callable[[Any], Any], shape: tuple[int, int], resamples: int, seed: int
) -> tuple[float, float]:
    seeds, conversations = shape
    random = np.random.default_rng(seed)
    equal, equal_seeds = (np.full(count, 1 / count) for count in (conversations, seeds))
    drawn = random.multinomial(conversations, equal, size=resamples)
    drawn_seeds = random.multinomial(seeds, equal_seeds, size=resamples) / seeds
    low, high = np.nanpercentile((measured(drawn) * drawn_seeds).sum(1), [2.5, 97.5])
    return float(low), float(high)


def _resampled(ratios: Ratios, drawn: Any) -> Any:
    """Return the measure ``[R, S]``; ``drawn [R, C]`` counts draws of each conversation.

    NaN for a draw of conversations that have nothing to measure, such as empty answers.
    """
    top, bottom = drawn @ ratios.numerator.T, drawn @ ratios.denominator.T
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def verdict(one: str, other: str, difference: Difference, measure: Measure) -> str:
    """Return one sentence with the better one first.

    >>> kl = Measure("KL", "Divergence from the teacher", "nats per token", "lower")
    >>> verdict("logits", "text", Difference(-0.21, -0.24, -0.18, 60), kl)
    'logits better than text by 0.210 ± 0.030 nats per token'
    >>> verdict("logits", "text", Difference(-0.01, -0.04, 0.02, 60), kl)
    'no difference seen between logits and text (0.010 ± 0.030 nats per token)'
    """
    size = f"{_figure(abs(difference.value))} ± {_figure(difference.half_width)} {measure.unit}"
    if difference.conversations < FEWEST_CONVERSATIONS:
        count = f"{difference.conversations}; {FEWEST_CONVERSATIONS} are needed"
        return f"too few held-out conversations to tell {one} from {other} ({count})"
    if not difference.certain:
        return f"no difference seen between {one} and {other} ({size})"
    if (difference.value > 0) == measure.lower_is_better:
        one, other = other, one
    return f"{one} better than {other} by {size}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if value == 0 or value >= 0.01 else f"{value:.1g}"


def regressions(before: Ratios, after: Ratios, measure: Measure) -> list[tuple[int, float, float]]:
    """Return (number, before, after) of the conversations that got worse, the worst first."""
    old, new = before.per_conversation(), after.per_conversation()
    worse = (new - old) if measure.lower_is_better else (old - new)
    order = np.argsort(-worse, kind="stable")
    return [(int(i), float(old[i]), float(new[i])) for i in order if worse[i] > 0]
