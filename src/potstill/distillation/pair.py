"""Open the student to train and its teacher; of equal models with LoRA, one copy."""

from __future__ import annotations

import os
from typing import Any

from potstill.distillation.settings import DistillSettings
from potstill.distillation.targets import opener_of, teacher_opener
from potstill.models.lora import name_base, trained_share, with_lora
from potstill.models.quantized import refuse_quantized_student
from potstill.processes import print_main
from potstill.protocols import Tokenizer
from potstill.teachers import BaseOfStudent, Teacher, open_teacher
from potstill.training import DistillationConfig


def open_student(settings: DistillSettings, args: DistillationConfig) -> tuple[Any, Tokenizer]:
    """Return the student, ready to train, and its tokenizer.

    Its trained weights are in float32. The frozen base of a LoRA adapter has the dtype of the run,
    but float32 where that cannot be trained through: float16 without a scaled loss, and FSDP, which
    shards weights of one dtype only.
    """
    opener = opener_of(settings)
    tokenizer = opener.tokenizer(settings.student)
    if settings.lora is None:
        student = opener.model(settings.student, dtype="float32")
        refuse_quantized_student(settings.student, student)
        if settings.freeze_embeddings:
            for module in (student.get_input_embeddings(), student.get_output_embeddings()):
                module.requires_grad_(False)
        return student, tokenizer
    base = opener.model(settings.student, dtype=_base_dtype(settings, args))
    refuse_quantized_student(settings.student, base)
    student = with_lora(base, settings.lora, alpha=settings.lora_alpha, seed=settings.seed)
    name_base(student, settings.student)
    trained, total = trained_share(student)
    print_main(f"LoRA: {trained:,} of {total:,} parameters are trained")
    return student, tokenizer


def open_pairs_teacher(
    settings: DistillSettings, args: DistillationConfig, student: Any
) -> Teacher:
    """Return the teacher; the student's own base if it is the same model and can be shared."""
    opener = teacher_opener(settings)
    same = settings.teacher == settings.student and opener.quantize is None
    if same and not settings.hard_label_weight:
        print_main(
            "note: teacher and student are the same model, so their divergence begins at 0 and "
            "there is nothing to learn; --hard-label-weight mixes in the data's text"
        )
    if settings.lora is None or not same or _is_sharded(args):
        return open_teacher(settings.teacher, **vars(opener))
    print_main("the teacher is the student without its adapter: one copy of the weights")
    return BaseOfStudent(student, tokenizer=opener.tokenizer(settings.teacher))


def _base_dtype(settings: DistillSettings, args: DistillationConfig) -> str:
    opener = opener_of(settings)
    unscaled = opener.dtype == "float16" and opener.device_type() != "cuda"
    return "float32" if unscaled or _is_sharded(args) else opener.dtype


def _is_sharded(args: DistillationConfig) -> bool:
    """Return whether FSDP or DeepSpeed may shard the student, by its settings or the launcher's."""
    launched = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    by_launcher = any(os.environ.get(name, "false").lower() == "true" for name in launched)
    return bool(args.fsdp or args.deepspeed or by_launcher)
