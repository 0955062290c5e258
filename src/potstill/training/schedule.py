"""Decide which micro-batches are the student's own text, and of which round of rollouts.

Everything follows from the number of the micro-batch in the run, so that a resumed run goes on as
an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class OnPolicySchedule:
    """Spread a share of on-policy micro-batches evenly over a run.

    >>> half = OnPolicySchedule(Fraction(1, 2), first=2, per_round=3)
    >>> [half.place(number) for number in range(10)]
    [None, None, None, (0, 0), None, (0, 1), None, (0, 2), None, (1, 0)]
    """

    share: Fraction
    """λ: on-policy micro-batches among all after ``first``, in (0, 1]."""
    first: int
    """The micro-batch from which on the share counts."""
    per_round: int
    """On-policy micro-batches trained on one round of rollouts."""

    @classmethod
    def of_run(
        cls, share: float, begins: float, steps: int, accumulation: int, per_round: int
    ) -> OnPolicySchedule:
        """Return the schedule of a run of ``steps`` with ``accumulation`` micro-batches each.

        ``begins`` is the share of the run after which rollouts begin.
        """
        first = math.ceil(Fraction(str(begins)) * steps) * accumulation
        return cls(Fraction(str(share)), first, per_round)

    def before(self, number: int) -> int:
        """Return how many on-policy micro-batches there are before micro-batch ``number``."""
        return max(0, math.floor((number - self.first) * self.share))

    def place(self, number: int) -> tuple[int, int] | None:
        """Return round and place in the round of a micro-batch; None if it is off-policy."""
        earlier = self.before(number)
        if self.before(number + 1) == earlier:
            return None
        return divmod(earlier, self.per_round)
