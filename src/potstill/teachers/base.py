"""Declare what a teacher is: it gives a target for every supervised position of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from potstill.losses import CallableHead
from potstill.models.heads import output_head
from potstill.protocols import Batch, CausalLM, Tokenizer
from potstill.teachers.targets import LossSettings, Target


class Teacher(Protocol):
    """Give targets, from a model in this process or from a capture on disk."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer whose ids the teacher reads, None if it is not known."""
        ...

    @property
    def vocabulary_rows(self) -> int:
        """Return the number of rows of the teacher's LM head."""
        ...

    @property
    def model(self) -> CausalLM | None:
        """Return the teacher's model, None if it is not in this process.

        It is used for sample answers and for the self-check. Training needs `targets` only.
        """
        ...

    def targets(self, batch: Batch) -> Target:
        """Return the targets at the positions `potstill.models.heads.supervised` selects.

        ``batch`` has ``input_ids``, ``labels`` and the other model inputs, ``[B, T]``. The target
        is on the batch's device.
        """
        ...

    def require(self, rows: Iterable[dict[str, Any]], loss: LossSettings | None = None) -> None:
        """Check before training that there are targets for these encoded conversations.

        ``loss`` is what they are used for. Raises: DataError if some have none, ConfigError if the
        targets cannot give this loss.
        """
        ...


def reads_new_text(teacher: Teacher) -> bool:
    """Return whether the teacher has targets for text that it has not seen before.

    A teacher without the attribute ``reads_new_text`` has.
    """
    return bool(getattr(teacher, "reads_new_text", True))


def single_device_model(teacher: Teacher) -> CausalLM | None:
    """Return the teacher's model if it can take the student's place, else None.

    It can if it is in this process, on one device, with a head that is not quantized.
    """
    model = teacher.model
    if model is None or len({parameter.device for parameter in model.parameters()}) > 1:
        return None
    head = output_head(model)
    return None if isinstance(head, CallableHead) else model
