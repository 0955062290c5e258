"""What a teacher is, and what it hands to the loss.

N supervised tokens, V vocabulary, H hidden. A loss knows targets, not teachers: a target may come from a model in memory (now),
a server or a disk (later). A target is the teacher's next-token distribution at each of the N supervised positions of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from potstill.losses import Head


@dataclass(frozen=True)
class LogitsTarget:
    """The whole distribution, not yet projected: ``hidden [N, H]`` and the head that makes logits of it, chunk by chunk."""

    hidden: Tensor
    head: Head


class Teacher(Protocol):
    """Whatever can say, for a batch of token ids, what it would have said at every supervised position."""

    def targets(self, batch: dict[str, Tensor]) -> LogitsTarget:
        """The targets at the positions that `potstill.heads.supervised` chooses, on the batch's device."""
        ...
