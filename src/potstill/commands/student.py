"""`potstill student`: make a student from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.errors import ConfigError
from potstill.reading import Reading


@dataclass(frozen=True)
class StudentRecipe(Reading):
    """Make a student from a teacher: keep some layers, or change the tokenizer."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo."""
    output_dir: str
    """Folder for the student, empty or new."""
    keep_layers: str | None = None
    """Layers to keep: 8, or 0,1,5,9, or half (default), or all (default with --tokenizer)."""
    data: str | None = None
    """Conversations that decide which layers are kept. Default: evenly spaced layers."""
    tokenizer: str | None = None
    """Another model's tokenizer. New tokens start from old tokens of the same bytes."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


def run(recipe: StudentRecipe) -> None:
    """Write the student and print its folder."""
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


def _layers(text: str | None) -> int | list[int] | str | None:
    if text is None or text in ("half", "all"):
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        need = "give a number (8), a list (0,1,5,9), half or all"
        raise ConfigError(f"--keep-layers {text}: {need}") from None
    return numbers if "," in text else numbers[0]
