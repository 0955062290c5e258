"""Use the frozen base of a student with a LoRA adapter as its teacher: one copy of the weights."""

from __future__ import annotations

from potstill.models.lora import without_adapter
from potstill.protocols import Batch, CausalLM
from potstill.teachers.local import LocalTeacher
from potstill.teachers.targets import StatesTarget


class BaseOfStudent(LocalTeacher):
    """Give the targets of a student without its adapter, in evaluation mode.

    The student stays trainable. It must not be sharded over processes.
    """

    @staticmethod
    def _prepared(model: CausalLM) -> CausalLM:
        return model

    def targets(self, batch: Batch) -> StatesTarget:
        """Return the base's hidden states ``[N, H]`` at the supervised positions, and the head."""
        with without_adapter(self.model):
            return super().targets(batch)
