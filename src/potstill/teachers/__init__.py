"""Open teachers and define their targets. A new kind of teacher is one file and a line in KINDS."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from potstill.models import ModelOpener
from potstill.protocols import Tokenizer
from potstill.teachers.base import Teacher as Teacher
from potstill.teachers.base import reads_new_text as reads_new_text
from potstill.teachers.base import single_device_model as single_device_model
from potstill.teachers.base_of_student import BaseOfStudent as BaseOfStudent
from potstill.teachers.capture import CaptureCounts as CaptureCounts
from potstill.teachers.capture import capture_conversations as capture_conversations
from potstill.teachers.captured import CapturedTeacher as CapturedTeacher
from potstill.teachers.captured import captured_date as captured_date
from potstill.teachers.captured import captured_keep as captured_keep
from potstill.teachers.captured import is_capture, open_captured, open_captured_tokenizer
from potstill.teachers.kept import KeptTeacher as KeptTeacher
from potstill.teachers.local import LocalTeacher as LocalTeacher
from potstill.teachers.local import open_local
from potstill.teachers.served import ServedTeacher as ServedTeacher
from potstill.teachers.served import is_url, open_served, open_served_tokenizer
from potstill.teachers.targets import BlockScores as BlockScores
from potstill.teachers.targets import CellTarget as CellTarget
from potstill.teachers.targets import LogitsTarget as LogitsTarget
from potstill.teachers.targets import LossSettings as LossSettings
from potstill.teachers.targets import StatesTarget as StatesTarget
from potstill.teachers.targets import Target as Target
from potstill.teachers.top_k import TopKTarget as TopKTarget
from potstill.teachers.vllm import VLLMTeacher as VLLMTeacher
from potstill.teachers.vllm import is_vllm, open_vllm, open_vllm_tokenizer


@dataclass(frozen=True)
class TeacherKind:
    """Describe one way to open a teacher."""

    name: str
    matches: Callable[[str], bool]
    """Return True for a source that this kind opens."""
    open: Callable[[str, ModelOpener], Teacher]
    open_tokenizer: Callable[[str, ModelOpener], Tokenizer]
    """Open the tokenizer alone, to check a pair before weights are read."""


LOCAL = TeacherKind(
    "local", lambda source: True, open_local, lambda source, opener: opener.tokenizer(source)
)
CAPTURED = TeacherKind("captured", is_capture, open_captured, open_captured_tokenizer)
SERVED = TeacherKind("served", is_url, open_served, open_served_tokenizer)
VLLM = TeacherKind("vllm", is_vllm, open_vllm, open_vllm_tokenizer)
KINDS = [CAPTURED, SERVED, VLLM, LOCAL]
"""The first kind that matches a source opens it; keep LOCAL last."""


def teacher_kind(source: str) -> TeacherKind:
    """Return the kind of teacher that ``source`` names."""
    return next(kind for kind in KINDS if kind.matches(source))


def open_teacher(source: str | os.PathLike[str], **settings: Any) -> Teacher:
    """Open a teacher: hub id, model folder, GGUF file, ``demo``, the folder of a capture, or
    the address of a server of potstill (http://…) or vLLM (vllm+http://…).

    ``settings`` are those of `potstill.models.ModelOpener`: device, dtype, chat_template,
    trust_remote_code. Raises: as `potstill.load_model`.
    """
    return teacher_kind(str(source)).open(str(source), ModelOpener(**settings))


def open_teacher_tokenizer(source: str, opener: ModelOpener) -> Tokenizer:
    """Open the tokenizer of the teacher that ``source`` names, without its weights."""
    return teacher_kind(source).open_tokenizer(source, opener)


def as_teacher(teacher: Any, tokenizer: Tokenizer | None = None) -> Teacher:
    """Return a `Teacher` as it is, and a causal language model as a `LocalTeacher`."""
    if callable(getattr(teacher, "targets", None)):
        return teacher  # type: ignore[no-any-return]
    return LocalTeacher(teacher, tokenizer=tokenizer)


__all__ = [
    "KINDS",
    "LOCAL",
    "SERVED",
    "VLLM",
    "BaseOfStudent",
    "BlockScores",
    "CaptureCounts",
    "CapturedTeacher",
    "CellTarget",
    "KeptTeacher",
    "LocalTeacher",
    "LogitsTarget",
    "LossSettings",
    "ServedTeacher",
    "StatesTarget",
    "Target",
    "Teacher",
    "TeacherKind",
    "TopKTarget",
    "VLLMTeacher",
    "as_teacher",
    "capture_conversations",
    "captured_date",
    "captured_keep",
    "open_teacher",
    "open_teacher_tokenizer",
    "reads_new_text",
    "single_device_model",
    "teacher_kind",
]
