"""Turn a large language model into a small one.

Public names are imported when they are first used: ``import potstill`` alone imports neither torch
nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from potstill.lazy import imported

if TYPE_CHECKING:
    from potstill.distillation import Run as Run
    from potstill.distillation import distill as distill
    from potstill.evaluation import Evaluation as Evaluation
    from potstill.evaluation import evaluate as evaluate
    from potstill.generation import answer_prompts as answer_prompts
    from potstill.models import load_model as load_model
    from potstill.students import change_tokenizer as change_tokenizer
    from potstill.students import keep_layers as keep_layers
    from potstill.teachers import LocalTeacher as LocalTeacher
    from potstill.teachers import open_teacher as open_teacher
    from potstill.training import DistillationConfig as DistillationConfig
    from potstill.training import DistillationTrainer as DistillationTrainer

__version__ = "0.2.0"

_HOME = {
    "DistillationConfig": "potstill.training",
    "DistillationTrainer": "potstill.training",
    "Evaluation": "potstill.evaluation",
    "LocalTeacher": "potstill.teachers",
    "Run": "potstill.distillation",
    "alignment": "potstill.alignment",
    "answer_prompts": "potstill.generation",
    "change_tokenizer": "potstill.students",
    "distill": "potstill.distillation",
    "evaluate": "potstill.evaluation",
    "keep_layers": "potstill.students",
    "load_model": "potstill.models",
    "losses": "potstill.losses",
    "open_teacher": "potstill.teachers",
}

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Evaluation",
    "LocalTeacher",
    "Run",
    "alignment",
    "answer_prompts",
    "change_tokenizer",
    "distill",
    "evaluate",
    "keep_layers",
    "load_model",
    "losses",
    "open_teacher",
]


def __getattr__(name: str) -> Any:
    return imported(name, "potstill", _HOME)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
