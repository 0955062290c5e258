"""Keep a teacher's hidden states of a few conversations in memory, for several passes over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from potstill.losses import CallableHead, Head
from potstill.models.heads import on_device
from potstill.protocols import Batch
from potstill.teachers.base import Teacher
from potstill.teachers.captured import batch_keys
from potstill.teachers.targets import LossSettings, StatesTarget


class KeptTeacher:
    """Give the targets of conversations whose states ``[n, H]`` are kept, by conversation key."""

    model: None = None
    tokenizer: None = None

    def __init__(self, states: dict[bytes, Tensor], head: Head | CallableHead) -> None:
        self.states, self.head = states, head
        self._heads: dict[torch.device, Head | CallableHead] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Teacher, batches: Iterable[Batch], device: torch.device) -> KeptTeacher:
        """Compute the states of ``batches`` on ``device`` once, and keep them on the CPU.

        The teacher's targets must be `StatesTarget`.
        """
        states: dict[bytes, Tensor] = {}
        head: Any = None
        for batch in batches:
            target: Any = teacher.targets(on_device(batch, device))
            head, hidden = target.head, target.hidden.cpu()
            keys = list(batch_keys(batch))
            parts = hidden.split([count for _, count in keys])
            states |= {key: part.clone() for (key, _), part in zip(keys, parts, strict=True)}
        return cls(states, head)

    @property
    def vocabulary_rows(self) -> int:
        """Return the number of rows of the head."""
        return len(self.head)

    def targets(self, batch: Batch) -> StatesTarget:
        """Return the kept states ``[N, H]`` at the supervised positions, and the head."""
        device = batch["labels"].device
        hidden = torch.cat([self.states[key] for key, _ in batch_keys(batch)])
        if device not in self._heads:
            self._heads[device] = self.head.to(device)
        return StatesTarget(hidden.to(device), self._heads[device])

    def require(self, rows: Iterable[dict[str, Any]], loss: LossSettings | None = None) -> None:
        """Accept any conversations: `targets` raises KeyError for one that is not kept."""
