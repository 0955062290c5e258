"""Measure a student beside its teacher, and compare two measurements with intervals."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from potstill.data import read_conversations
from potstill.data.forms import as_conversation
from potstill.defaults import MAX_LENGTH
from potstill.errors import DataError
from potstill.evaluation.held_out import HeldOut
from potstill.evaluation.measures import TOKEN_MEASURES
from potstill.evaluation.paired import Difference, Ratios, paired_difference, verdict
from potstill.evaluation.scores import measure_ratios, summarize
from potstill.evaluation.table import as_table
from potstill.evaluation.tasks import Tasks
from potstill.models import ModelOpener
from potstill.protocols import CausalLM, Tokenizer
from potstill.reading import Reading
from potstill.teachers import Teacher, as_teacher, open_teacher, open_teacher_tokenizer

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same conversations: a difference with an interval for each measure."""

    differences: dict[str, Difference]

    def __getitem__(self, measure: str) -> Difference:
        """Return the first minus the second, for a name of `TOKEN_MEASURES`."""
        return self.differences[measure]

    def verdict(self, one: str = "this", other: str = "the other") -> str:
        """Return one sentence about KL from the teacher, or bits per byte across tokenizers."""
        names = ("kl_nats_per_token", "bits_per_byte")
        name = next(name for name in names if name in self.differences)
        return verdict(one, other, self.differences[name], TOKEN_MEASURES[name])


@dataclass(frozen=True)
class Evaluation:
    """A student on held-out conversations, beside its teacher."""

    student: dict[str, Any]
    """Each of `TOKEN_MEASURES`, ``tokens``, ``bytes``, and 95 % intervals under ``ci95``."""
    teacher: dict[str, Any]
    fingerprint: str
    """Identifies the conversations."""
    sums: dict[str, Any] = field(repr=False)
    """The student's sums per conversation (`potstill.evaluation.conversation_sums`)."""
    tasks: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, measure: str) -> float:
        """Return one of the student's measures."""
        value: float = self.student[measure]
        return value

    def compare(self, other: Evaluation) -> Comparison:
        """Return this evaluation minus ``other``, paired by conversation, with 95 % intervals.

        Measures per token are left out if the two students have different tokens. Raises:
        DataError if the conversations differ.
        """
        if self.fingerprint != other.fingerprint:
            raise DataError(
                f"evaluations of different conversations ({self.fingerprint} and "
                f"{other.fingerprint}) cannot be compared; evaluate both on the same data"
            )
        ours, theirs = measure_ratios(self.sums), measure_ratios(other.sums)
        same_tokens = self.sums["tokens"] == other.sums["tokens"]
        return Comparison(
            {
                name: paired_difference(_ratios(one), _ratios(theirs[name]))
                for name, one in ours.items()
                if one and theirs[name] and (same_tokens or name == "bits_per_byte")
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """Return ``{"teacher": …, "student": …}``, with ``"tasks"`` if any were measured."""
        measured = {"teacher": self.teacher, "student": self.student}
        return {**measured, "tasks": self.tasks} if self.tasks else measured

    def __str__(self) -> str:
        return as_table(self.as_dict())

    @classmethod
    def of_run(cls, measured: dict[str, Any], when: str) -> Evaluation:
        """Return the evaluation ``before`` or ``after`` from a run's evaluation.json."""
        kept = measured["conversations"]
        return cls(measured[when], measured["teacher"], kept["fingerprint"], kept[when])


def evaluate(
    student: Source | CausalLM,
    teacher: Source | CausalLM | Teacher,
    data: Source | Iterable[Mapping[str, Any]],
    *,
    tokenizer: Tokenizer | None = None,
    teacher_tokenizer: Tokenizer | None = None,
    tasks: str | None = None,
    max_length: int = MAX_LENGTH,
    reading: Reading | None = None,
    **opening: Any,
) -> Evaluation:
    """Measure a student and its teacher on held-out conversations.

    Models are sources (hub id, folder, GGUF, ``demo``) or already open; the tokenizer of an open
    model is found by its name if it is not given. ``data`` is a file, a data set's name or
    conversations with answers; ``reading`` says how a file is read. ``tasks`` as in `potstill
    evaluate --tasks`. ``opening`` are settings of `potstill.models.ModelOpener`.

    Raises: as `potstill.load_model`; DataError for data without a supervised token.
    """
    opener, chosen_tasks, is_source = ModelOpener(**opening), Tasks(tasks), (str, os.PathLike)
    tokenizer = tokenizer or _tokenizer_of(student, opener)
    if isinstance(teacher, is_source):
        reader = teacher_tokenizer or open_teacher_tokenizer(str(teacher), opener)
    else:
        reader = teacher_tokenizer or _teacher_tokenizer(as_teacher(teacher), opener)
    pair = HeldOut(reader, tokenizer, _conversations(data, reading), max_length=max_length)
    is_open = not isinstance(teacher, is_source)
    source = as_teacher(teacher) if is_open else open_teacher(str(teacher), **vars(opener))
    of_teacher = summarize(pair.score_teacher(source))  # first: its errors name the teacher
    model: Any = opener.model(student) if isinstance(student, is_source) else student
    was_training = model.training
    model.eval()
    try:
        student_scores = pair.score_student(model, source, own_answers=True)
        abilities = {"student": chosen_tasks.measure(model, tokenizer)} if tasks else {}
        if tasks and source.model is not None:
            abilities = {"teacher": chosen_tasks.measure(source.model, reader), **abilities}
    finally:
        model.train(was_training)
    measured, kept = summarize(student_scores), pair.per_conversation({"student": student_scores})
    return Evaluation(measured, of_teacher, kept["fingerprint"], kept["student"], abilities)


def _teacher_tokenizer(teacher: Teacher, opener: ModelOpener) -> Tokenizer:
    return teacher.tokenizer or _tokenizer_of(teacher.model, opener)


def _conversations(
    data: Source | Iterable[Mapping[str, Any]], reading: Reading | None
) -> list[dict[str, Any]]:
    if isinstance(data, str | os.PathLike):
        return list(read_conversations(data, reading=reading))
    return [as_conversation(dict(row), f"row {number}") for number, row in enumerate(data, 1)]


def _tokenizer_of(model: Any, opener: ModelOpener) -> Tokenizer:
    if isinstance(model, str | os.PathLike):
        return opener.tokenizer(model)
    return opener.tokenizer(model.config.name_or_path)


def _ratios(pair: Any) -> Ratios:
    numerator, denominator = (np.asarray(part)[None] for part in pair)
    return Ratios(numerator, denominator)
