"""Use a frozen model in this process as a teacher, in its own dtype, on this or another device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from potstill.losses import CallableHead, Head
from potstill.models import ModelOpener
from potstill.models.heads import hidden_states, model_inputs, on_device, output_head, supervised
from potstill.protocols import Batch, CausalLM, Tokenizer
from potstill.teachers.targets import LossSettings, StatesTarget


class LocalTeacher:
    """Use ``model`` as a teacher, over the first ``rows`` of its vocabulary (default: all).

    The model is frozen and put into evaluation mode.
    """

    def __init__(
        self, model: CausalLM, *, rows: int | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model: CausalLM = self._prepared(model)
        self.rows = rows
        self.tokenizer = tokenizer
        self._heads: dict[torch.device, Head | CallableHead] = {}

    @staticmethod
    def _prepared(model: CausalLM) -> CausalLM:
        return model.eval().requires_grad_(False)

    @property
    def vocabulary_rows(self) -> int:
        """Return the number of head rows, cut to ``rows``."""
        return len(output_head(self.model, rows=self.rows))

    @torch.no_grad()
    def targets(self, batch: Batch) -> StatesTarget:
        """Return hidden states ``[N, H]`` at the supervised positions, and the head."""
        own_device, device = self.model.device, batch["labels"].device
        inputs = on_device(model_inputs(batch), own_device)
        # The teacher keeps its own dtype: autocast would cast its weights again at every step.
        with torch.autocast(own_device.type, enabled=False):
            states = hidden_states(self.model, inputs)
        # If the model is spread over several GPUs, its states are on the last one.
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
