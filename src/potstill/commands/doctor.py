"""`potstill doctor`: check a teacher, a student and a planned run before training."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass

from potstill.defaults import MAX_LENGTH
from potstill.reading import Reading

SHOWN = 3
"""Rows of the data that are shown."""


@dataclass(frozen=True)
class DoctorRecipe(Reading):
    """Check whether and how a teacher can teach a student, and what it will cost."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo. Weights are not needed."""
    student: str
    """The model to train, given like the teacher."""
    data: str | None = None
    """Conversations with the teacher's answers, as a .jsonl file or a data set's name."""
    max_steps: int | None = None
    """Optimizer steps. Default: three passes, or a million tokens without data."""
    batch_size: int = 8
    """Conversations in a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step."""
    max_length: int = MAX_LENGTH
    """Tokens at which a conversation is cut."""
    precision: str = "bf16"
    """bf16, fp16 or fp32, of the planned run."""
    quantize_teacher: str | None = None
    """8bit or 4bit: the planned run quantizes its teacher (needs potstill[quantize]). With
    --with-weights, also measure what that costs."""
    lora: int | None = None
    """The planned run trains a LoRA adapter of this rank (needs potstill[peft])."""
    activation_checkpointing: bool = False
    """The planned run keeps only the inputs of layers for the backward pass."""
    card: str | None = None
    """Estimate the hours on a10, a100, a100-40gb, b200, h100, h200, l4, l40s, mi300x, rtx3090 or
    rtx4090."""
    chat_template: str | None = None
    """The path of a Jinja template, or plain for tokenizers that have none."""
    with_weights: bool = False
    """Also score the answers with the teacher's weights, under both chat templates."""
    device: str = "auto"
    """auto, cpu, cuda or mps, with --with-weights."""
    trust_remote_code: bool = False
    """Run code that comes with the models. Read it first."""
    json: bool = False
    """Print JSON instead of a page."""


def run(recipe: DoctorRecipe) -> None:
    """Print the diagnosis."""
    from potstill.doctor import as_text, examine
    from potstill.errors import ConfigError
    from potstill.teachers import LOCAL, teacher_kind

    if teacher_kind(recipe.teacher) is not LOCAL:
        raise ConfigError(
            f"{recipe.teacher}: not a model in this process; doctor examines models: give the "
            "teacher's own name or folder"
        )
    reading = dataclasses.asdict(recipe.reading)
    settings = {name: value for name, value in vars(recipe).items() if name not in reading}
    as_json = settings.pop("json")
    diagnosis = examine(**settings, reading=recipe.reading)
    as_dict = diagnosis.as_dict
    print(json.dumps(as_dict(), indent=1, ensure_ascii=False) if as_json else as_text(diagnosis))
    if recipe.data and not as_json:
        _show_rows(recipe)


def _show_rows(recipe: DoctorRecipe) -> None:
    """Print the first rows as the student will learn them."""
    from potstill.data import read_conversations
    from potstill.data.preview import preview
    from potstill.models import ModelOpener

    opener = ModelOpener(
        chat_template=recipe.chat_template, trust_remote_code=recipe.trust_remote_code
    )
    rows = itertools.islice(read_conversations(str(recipe.data), reading=recipe.reading), SHOWN)
    tokenizer = opener.tokenizer(recipe.student)
    print("\n" + preview(list(rows), tokenizer, recipe.student, max_length=recipe.max_length))
