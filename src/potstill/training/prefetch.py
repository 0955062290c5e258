"""Let a teacher prepare the targets of the next batches while the student computes."""

from __future__ import annotations

from typing import Any

from potstill.protocols import Batch
from potstill.training.objectives import Objective


class PrefetchingLayout:
    """Lay out a batch, and announce it to the objective's teacher.

    accelerate lays out a batch before the step on the previous one, and the Trainer all
    micro-batches of an optimizer step before the first.
    """

    def __init__(self, layout: Any, objective: Objective) -> None:
        self.layout, self.objective = layout, objective

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return the batch of ``rows``."""
        batch: Batch = self.layout(rows)
        teacher: Any = self.objective.teacher
        teacher.prefetch(self.objective.teacher_batch(batch))
        return batch


def with_prefetching(layout: Any, objective: Objective, *, workers: int) -> Any:
    """Return a layout that prefetches, if the teacher has ``prefetch``; else ``layout``.

    With ``workers``, other processes lay out the batches: they cannot prefetch for this one.
    """
    if workers or not callable(getattr(objective.teacher, "prefetch", None)):
        return layout
    return PrefetchingLayout(layout, objective)
