"""A run's teacher before training: capture what is missing, check that all targets exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from potstill.data import tokenize_conversations
from potstill.distillation.settings import DistillSettings
from potstill.errors import ConfigError
from potstill.generation.keys import identify_tokenizer
from potstill.generation.store import data_made_with
from potstill.models import ModelOpener
from potstill.models.quantized import quantization_of
from potstill.processes import broadcast_from_main, is_main_process, print_main
from potstill.teachers import (
    LOCAL,
    SERVED,
    VLLM,
    LocalTeacher,
    LossSettings,
    ServedTeacher,
    Teacher,
    VLLMTeacher,
    capture_conversations,
    captured_keep,
    open_teacher,
    teacher_kind,
)
from potstill.teachers.quantization_cost import ExactStates, known_quantization, measured_cost


def opener_of(settings: DistillSettings) -> ModelOpener:
    """Return how this run opens its teacher and, for evaluation, its students."""
    return replace(ModelOpener.of(settings), attention=settings.attention)


def teacher_opener(settings: DistillSettings) -> ModelOpener:
    """Return how this run opens its teacher.

    A captured or served teacher was quantized, or not, where it was computed. Raises: ConfigError
    if it is to be quantized here.
    """
    if settings.quantize_teacher is None or settings.teacher_model is not None:
        return opener_of(settings)
    if teacher_kind(settings.teacher) is not LOCAL:
        makers = {SERVED: "give --quantize-teacher to potstill serve", VLLM: "let vLLM quantize it"}
        need = makers.get(
            teacher_kind(settings.teacher), "give --quantize-teacher to potstill capture"
        )
        raise ConfigError(
            f"{settings.teacher}: not a model in this process, so it cannot be quantized here; "
            f"{need}"
        )
    return replace(ModelOpener.of_teacher(settings), attention=settings.attention)


def capture_missing(settings: DistillSettings, conversations: list[dict[str, Any]]) -> None:
    """Capture from ``teacher_model`` what the capture folder ``teacher`` lacks.

    Raises: ConfigError if ``teacher`` is a server.
    """
    if teacher_kind(settings.teacher) in (SERVED, VLLM):
        raise ConfigError(
            f"{settings.teacher}: a server computes what it is asked; leave out --teacher-model, "
            "which fills the folder of a capture"
        )
    if is_main_process():
        counts = capture_conversations(
            str(settings.teacher_model),
            conversations,
            settings.teacher,
            keep=captured_keep(settings.teacher) or "states",
            max_length=settings.max_length,
            opener=ModelOpener.of_teacher(settings),
        )
        print_main(f"{settings.teacher}: {counts}")
    broadcast_from_main(True)  # the other processes wait for the files


def teacher_identity(settings: DistillSettings) -> dict[str, str]:
    """Return what tells a server's teacher from another one at the same address.

    Empty for other teachers. Raises: ConfigError if `potstill generate` made the data with another
    tokenizer or chat template.
    """
    if teacher_kind(settings.teacher) is not SERVED:
        return {}
    teacher = open_teacher(settings.teacher, **vars(teacher_opener(settings)))
    assert isinstance(teacher, ServedTeacher)
    made_with = data_made_with(settings.data)
    found = {} if teacher.tokenizer is None else identify_tokenizer(teacher.tokenizer)
    for name, value in found.items():
        if made_with.get(name) not in (None, value) and settings.method != "text":
            maker = made_with.get("teacher")
            raise ConfigError(
                f"{settings.data}: made by {maker}, with another {name.replace('_', ' ')} than "
                f"that of {settings.teacher}; serve {maker}, or generate the answers again"
            )
    return {"teacher": teacher.identity}


def open_measured_teacher(
    settings: DistillSettings, rows: Iterable[dict[str, Any]]
) -> tuple[Teacher, dict[str, Any] | None]:
    """Return the teacher, and what is known of its quantization; None if it has none.

    If this run quantizes it, the cost is measured on ``rows``, in the teacher's tokens.
    """
    opener, exact = teacher_opener(settings), None
    if opener.quantize:
        exact = ExactStates.collect(settings.teacher, opener, rows)
    teacher = open_teacher(settings.teacher, **vars(opener))
    if opener.quantize and isinstance(teacher, LocalTeacher):
        assert teacher.model is not None
        found = quantization_of(teacher.model)
        return teacher, {"quantization": found, **measured_cost(exact, teacher)}
    return teacher, known_quantization(teacher)


def require_targets(
    settings: DistillSettings,
    loss: LossSettings,
    dataset: Any,
    held_out: list[dict[str, Any]],
) -> None:
    """Check that the teacher has targets for all rows, also those that only evaluation reads."""
    if teacher_kind(settings.teacher) is LOCAL:
        return
    teacher = open_teacher(settings.teacher, **vars(teacher_opener(settings)))
    if settings.method == "text":
        print_main("note: method text learns from the text alone; its teacher is only evaluated")
    else:
        if settings.method == "cross" and captured_keep(settings.teacher) == "sparse":
            raise ConfigError(
                f"{settings.teacher}: a sparse capture; method cross needs the teacher's hidden "
                "states; capture with --keep states"
            )
        teacher.require(dataset, loss)
        if isinstance(teacher, VLLMTeacher):
            print_main(
                f"note: the teacher gives its {teacher.top_k} most likely tokens; the divergence "
                "over these and the rest is a lower bound, here and in the report"
            )
    if teacher.tokenizer is not None:
        rows, _ = tokenize_conversations(
            held_out, teacher.tokenizer, max_length=settings.max_length
        )
        teacher.require(rows)
