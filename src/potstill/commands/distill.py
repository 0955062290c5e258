"""`potstill distill`: train a student, evaluate it and write a report."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.distillation.settings import DistillSettings


@dataclass(frozen=True)
class DistillRecipe(DistillSettings):
    """Train a student, evaluate it before and after, and write a report."""


def run(recipe: DistillRecipe) -> None:
    """Run every stage that is not done yet."""
    from potstill.distillation import run_distillation
    from potstill.training.kept_memory import keep_freed_memory

    if recipe.device in ("auto", "cpu"):
        keep_freed_memory()
    run_distillation(recipe)
