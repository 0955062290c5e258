"""The result of an examination, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from potstill.alignment import VocabularyComparison
from potstill.doctor.cost import Cost, ModelSize, Plan
from potstill.doctor.measured_text import MeasuredText
from potstill.doctor.storage import Storage


@dataclass(frozen=True)
class Side:
    """The properties of one model that a run depends on."""

    source: str
    tokens: int
    """Tokens of its tokenizer; the head may have more rows."""
    size: ModelSize
    chat_template: str | None
    """"its own", "plain", or the given path; None without one."""
    opening: str
    """The text that the template writes before the user's first word."""
    ends_turn: str | None
    """The special token with which the template ends an answer."""
    bos: str | None
    eos: str | None
    stops: list[str]
    """Tokens at which its generation stops."""
    context_tokens: int | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found; ``--json`` prints it."""

    method: str
    """The method to use: logits, cross or text."""
    reason: str
    command: str
    teacher: Side
    student: Side
    vocabularies: VocabularyComparison
    data: str | None
    text: MeasuredText | None
    """Measurements of the data."""
    teacher_bits_per_byte: dict[str, float] | None
    """Of the answers, under the teacher's chat template and under the student's."""
    plan: Plan
    costs: dict[str, Cost]
    """For text, and for ``method``."""
    card: str | None
    notes: list[str]
    """What to know or to fix before the run."""
    storage: Storage | None = None
    """What a captured or served teacher would take; None with text."""
    quantization_cost: dict[str, Any] | None = None
    """What quantizing the teacher costs on the answers; ``not_measured`` is a reason. None if the
    teacher is not quantized here, or no weights were opened."""

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and derived values, ready for JSON."""
        found = asdict(self)
        if self.text is not None:
            derived = {"with_target": self.text.with_target, "disagreeing": self.text.disagreeing}
            found["text"] |= derived
        for name, cost in self.costs.items():
            found["costs"][name] |= {"flops": cost.flops, "memory_bytes": cost.memory_bytes}
        return found
