"""`potstill evaluate`: measure a student against its teacher."""

from __future__ import annotations

import json
from dataclasses import dataclass

from potstill.defaults import MAX_LENGTH
from potstill.reading import Reading


@dataclass(frozen=True)
class EvaluateRecipe(Reading):
    """Measure a student against its teacher on held-out conversations."""

    student: str
    """Hub id, model folder, GGUF file, or demo."""
    teacher: str
    """The teacher, given like the student."""
    data: str
    """Held-out conversations, as a .jsonl file or a data set's name."""
    tasks: str | None = None
    """Tasks of lm-evaluation-harness and .jsonl files of questions, separated by commas."""
    max_length: int = MAX_LENGTH
    """Tokens at which a conversation is cut."""
    chat_template: str | None = None
    """The path of a Jinja template, or plain for tokenizers that have none."""
    precision: str = "bf16"
    """bf16, fp16 or fp32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    json: bool = False
    """Print JSON instead of a table."""
    trust_remote_code: bool = False
    """Run code that comes with the models. Read it first."""


def run(recipe: EvaluateRecipe) -> None:
    """Print the measures of both models."""
    from potstill.evaluation import as_table, evaluate
    from potstill.models import dtype_of

    evaluation = evaluate(
        recipe.student,
        recipe.teacher,
        recipe.data,
        reading=recipe.reading,
        tasks=recipe.tasks,
        max_length=recipe.max_length,
        chat_template=recipe.chat_template,
        dtype=dtype_of(recipe.precision),
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    measured = evaluation.as_dict()
    print(json.dumps(measured, indent=1, allow_nan=False) if recipe.json else as_table(measured))
