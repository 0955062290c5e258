"""A teacher in this process: a model in memory, without gradients, in its own dtype, on this or another device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from potstill.heads import hidden_states, output_head, supervised
from potstill.losses import Head
from potstill.teachers.base import LogitsTarget


class LocalTeacher:
    """``model`` as a teacher over the first ``rows`` of its vocabulary (all of them by default). It is frozen for good."""

    def __init__(self, model: Any, *, rows: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.rows = rows
        self._heads: dict[torch.device, Head] = {}

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> LogitsTarget:
        """Hidden states ``[N, H]`` at the supervised positions of ``batch``, and the head, both on the batch's device."""
        home, away = self.model.device, batch["labels"].device
        inputs = {name: tensor.to(home) for name, tensor in batch.items() if name != "labels"}
        # The teacher keeps its own dtype: the autocast meant for the student would only cast its weights again.
        with torch.autocast(home.type, enabled=False):
            states = hidden_states(self.model, inputs)
        hidden, _ = supervised(states, batch["labels"].to(states.device))  # of a model on several cards, the last one's
        return LogitsTarget(hidden.to(away), self._head_on(away))

    def _head_on(self, device: torch.device) -> Head:
        if device not in self._heads:
            head = output_head(self.model, rows=self.rows)
            bias = None if head.bias is None else head.bias.to(device)
            self._heads[device] = dataclasses.replace(head, weight=head.weight.to(device), bias=bias)
        return self._heads[device]
