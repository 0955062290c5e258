"""Measure the student's answers in each round, and stop a run in which they collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.errors import CollapsedRollouts
from potstill.sampling import SampledRow
from potstill.sampling.repetition import GRAM, repeated_grams

MOST_REPEATED = 0.7
"""Share of repeated 4-grams that counts as a collapse; good sampled text has 0 to 0.1."""
MOST_EMPTY = 0.9
NUMBERS = ("answers", "ended", "tokens", "empty", "grams", "repeated", "nats")


@dataclass(frozen=True)
class RolloutHealth:
    """Sums over the answers of a round."""

    answers: float
    ended: float
    tokens: float
    empty: float
    """Answers that are only an end token."""
    grams: float
    repeated: float
    """4-grams that occurred before in the same answer."""
    nats: float
    """Σ −log p of the sampled tokens: at temperature 1 an estimate of the entropy."""

    @classmethod
    def of(cls, rows: Sequence[SampledRow], ended: Sequence[bool]) -> RolloutHealth:
        """Measure sampled answers; ``ended`` says which have an end token."""
        counts = [repeated_grams(row.tokens) for row in rows]
        repeated, grams = (sum(column) for column in zip(*counts, strict=True))
        lengths = [len(row.tokens) for row in rows]
        empty = sum(end and length == 1 for end, length in zip(ended, lengths, strict=True))
        nats = sum(row.nats for row in rows)
        return cls(len(rows), sum(ended), sum(lengths), empty, grams, repeated, nats)

    def as_logs(self) -> dict[str, float]:
        """Return what is logged: shares, tokens an answer and nats a token."""
        return {
            "rollout_ended": self.ended / max(1, self.answers),
            "rollout_tokens": self.tokens / max(1, self.answers),
            "rollout_repeated": self.repeated / max(1, self.grams),
            "rollout_entropy": self.nats / max(1, self.tokens),
        }

    def refuse_collapse(self, *, number: int, step: int) -> None:
        """Raises: CollapsedRollouts if the answers repeat themselves, or are empty."""
        repeated, empty = self.repeated / max(1, self.grams), self.empty / max(1, self.answers)
        if repeated < MOST_REPEATED and empty < MOST_EMPTY:
            return
        found = (
            f"{repeated:.0%} of the {GRAM}-grams in the student's answers repeat earlier ones "
            f"(at most {MOST_REPEATED:.0%})"
            if repeated >= MOST_REPEATED
            else f"{empty:.0%} of the student's answers are empty (at most {MOST_EMPTY:.0%})"
        )
        advice = (
            "train it on the teacher's text first: --on-policy-from 0.5"
            if number == 0
            else "lower --learning-rate or --on-policy, or shorten --rollout-tokens; earlier "
            "checkpoints are good"
        )
        raise CollapsedRollouts(f"step {step}, round {number} of rollouts: {found}; {advice}")
