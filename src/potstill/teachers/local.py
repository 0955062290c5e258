"""A teacher in this process: a frozen model in its own dtype, on this or another device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from potstill.losses import CallableHead, Head
from potstill.models import ModelOpener
from potstill.models.heads import hidden_states, output_head, supervised
from potstill.protocols import CausalLM, Tokenizer
from potstill.teachers.targets import LossSettings, StatesTarget


class LocalTeacher:
    """Use ``model`` as a teacher, over the first ``rows`` of its vocabulary (default: all).

    The model is frozen and put into evaluation mode.
    """

    def __init__(
        self, model: CausalLM, *, rows: int | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model: CausalLM = model.eval().requires_grad_(False)
        self.rows = rows
        self.tokenizer = tokenizer
        self._heads: dict[torch.device, Head | CallableHead] = {}

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the head, cut to ``rows``."""
        return len(output_head(self.model, rows=self.rows))

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor]) -> StatesTarget:
        """Return hidden states ``[N, H]`` at the supervised positions, and the head."""
        own_device, device = self.model.device, batch["labels"].device
        inputs = {name: tensor.to(own_device) for name, tensor in batch.items() if name != "labels"}
        # The teacher keeps its own dtype: autocast would cast its weights again at every step.
        with torch.autocast(own_device.type, enabled=False):
            states = hidden_states(self.model, inputs)
        # A model on several cards leaves its states on the last one.
        hidden, _ = supervised(states, batch["labels"].to(states.device))
        return StatesTarget(hidden.to(device), self._head_on(device))

    def require(self, rows: Iterable[dict[str, Any]], loss: LossSettings | None = None) -> None:
        """Accept any conversations: the model reads all of them."""

    def _head_on(self, device: torch.device) -> Head | CallableHead:
        if device not in self._heads:
            self._heads[device] = output_head(self.model, rows=self.rows).to(device)
        return self._heads[device]


def open_local(source: str, opener: ModelOpener) -> LocalTeacher:
    """Open a hub id, folder, GGUF file or ``demo`` as a teacher in this process."""
    model, tokenizer = opener.model_and_tokenizer(source)
    return LocalTeacher(model, tokenizer=tokenizer)
