"""`potstill student`: make a student from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.errors import ConfigError


@dataclass(frozen=True)
class StudentRecipe:
    """Make a student from a teacher: keep some layers, or change the tokenizer."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo."""
    output_dir: str
    """Folder for the student, which must not hold anything yet."""
    keep_layers: str | None = None
    """How many layers to keep, evenly spaced with both ends (8), which ones (0,1,5,9), half, or all. Without it: half, or all with
    --tokenizer."""
    data: str | None = None
    """Conversations on which a number of layers is chosen: those that are missed least, instead of evenly spaced ones."""
    tokenizer: str | None = None
    """Whose tokenizer the student gets instead of its teacher's: hub id, folder, GGUF file or demo. Each new token starts from the
    teacher's tokens for the same bytes. If it has no chat template, the student gets the plain one."""
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
        raise ConfigError(
            f"--keep-layers {text}: give a number (8), a list (0,1,5,9), half or all"
        ) from None
    return numbers if "," in text else numbers[0]
