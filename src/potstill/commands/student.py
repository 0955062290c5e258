"""`potstill student`: make a student from a teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from potstill.errors import ConfigError
from potstill.reading import Reading

ANSWER_TOKENS = 64
SIZES = (
    *("parameters", "bytes", "precision"),
    *("hidden_size", "intermediate_size", "kv_groups", "experts"),
)
"""Settings with which the student is cut to a size."""
MOST_READ = 20_000
"""Conversations of --data that are read; the calibration text is spread over them."""
PROMPTS = 128
"""Prompts of the demo that the teacher answers for calibration."""


@dataclass(frozen=True)
class StudentRecipe(Reading):
    """Make a student from a teacher: of any size, or with another tokenizer."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo."""
    output_dir: str
    """Folder for the student, empty or new."""
    parameters: str | None = None
    """Size of the student: 80M, 0.5B, or 50%. The best depth and width are searched."""
    bytes: str | None = None
    """Size of the student's weights: 400MB, or 380MiB; see --precision."""
    precision: str | None = None
    """Precision of the weights in --bytes: bf16 (default), fp32, fp16, int8 or int4."""
    keep_layers: str | None = None
    """Layers to keep: 8, or 0,1,5,9, or half (default), or all (default with --tokenizer)."""
    hidden_size: int | None = None
    """Hidden channels to keep, in every layer."""
    intermediate_size: int | None = None
    """FFN neurons to keep in each layer, or in each expert of a mixture."""
    kv_groups: int | None = None
    """Key/value heads to keep in each layer, each with its query heads."""
    experts: int | None = None
    """Experts to keep in each layer of a mixture."""
    data: str | None = None
    """Conversations to calibrate on. Default: evenly spaced layers, or the teacher's answers."""
    calibration_conversations: int = 128
    """Conversations of --data that calibrate a student of a size; a quarter scores it."""
    tokenizer: str | None = None
    """Another model's tokenizer. New tokens start from old tokens of the same bytes."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


def run(recipe: StudentRecipe) -> None:
    """Write the student and print its folder."""
    if any(getattr(recipe, name) is not None for name in SIZES):
        folder = _sized(recipe)
    else:
        from potstill.students import make_student

        folder = make_student(
            recipe.teacher,
            recipe.output_dir,
            keep=_layers(recipe.keep_layers),
            data=recipe.data,
            reading=recipe.reading,
            tokenizer=recipe.tokenizer,
            trust_remote_code=recipe.trust_remote_code,
        )
    print(f"student: {folder}")


def _sized(recipe: StudentRecipe) -> Any:
    from potstill.students.make_sized import SizeWanted, make_sized_student
    from potstill.training.kept_memory import keep_freed_memory

    if recipe.tokenizer:
        need = "first make the student of a size, then give it as the teacher with --tokenizer"
        raise ConfigError(f"tokenizer cannot be changed together with the size; {need}")
    keep_freed_memory()
    size = SizeWanted(
        parameters=recipe.parameters,
        bytes=recipe.bytes,
        precision=recipe.precision,
        layers=_layers(recipe.keep_layers),
        hidden=recipe.hidden_size,
        neurons=recipe.intermediate_size,
        groups=recipe.kv_groups,
        experts=recipe.experts,
    )

    def answers(model: Any, tokenizer: Any) -> Iterable[Any]:
        from potstill.data import read_conversations

        if recipe.data is None:
            return teacher_answers(model, tokenizer)
        rows = read_conversations(recipe.data, reading=recipe.reading)
        return _spread(list(itertools.islice(rows, MOST_READ)), recipe.calibration_conversations)

    return make_sized_student(
        recipe.teacher,
        recipe.output_dir,
        size,
        answers=answers,
        trust_remote_code=recipe.trust_remote_code,
    )


def teacher_answers(model: Any, tokenizer: Any) -> list[Any]:
    """Return the teacher's answers to `PROMPTS` prompts of the demo, spread over its subjects."""
    from importlib import resources

    from potstill.data import read_prompts
    from potstill.generation import answer_prompts
    from potstill.processes import print_main

    with resources.as_file(resources.files("potstill.data") / "demo_prompts.jsonl") as path:
        prompts = [row["messages"] for row in read_prompts(path) if row["split"] == "train"]
    print_main(f"calibration text: the teacher answers {PROMPTS} prompts of the demo")
    chosen = _spread(prompts, PROMPTS)
    return answer_prompts(model, tokenizer, chosen, max_new_tokens=ANSWER_TOKENS)


def _spread(rows: list[Any], count: int) -> list[Any]:
    """Return ``count`` rows from everywhere, or all if there are fewer."""
    count = max(1, min(count, len(rows)))
    return [rows[i * len(rows) // count] for i in range(count)]


def _layers(text: str | None) -> int | list[int] | str | None:
    if text is None or text in ("half", "all"):
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        need = "give a number (8), a list (0,1,5,9), half or all"
        raise ConfigError(f"--keep-layers {text}: {need}") from None
    return numbers if "," in text else numbers[0]
