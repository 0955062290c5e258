"""Training: what is learned (objectives.py, cross_objective.py), the checks before the first step
(self_check.py), and the Trainer (trainer.py, config.py, callbacks.py)."""

# ruff: noqa: E402
from potstill.models.quantized import import_quietly

import_quietly("transformers.trainer")  # it imports torchao, if that is installed, which warns

from potstill.training.callbacks import MetricsFile as MetricsFile
from potstill.training.callbacks import TrainingProgress as TrainingProgress
from potstill.training.config import METHODS as METHODS
from potstill.training.config import DistillationConfig as DistillationConfig
from potstill.training.cross_objective import ALIGNMENTS as ALIGNMENTS
from potstill.training.objectives import Objective as Objective
from potstill.training.objectives import make_objective as make_objective
from potstill.training.trainer import DistillationTrainer as DistillationTrainer

__all__ = [
    "ALIGNMENTS",
    "METHODS",
    "DistillationConfig",
    "DistillationTrainer",
    "MetricsFile",
    "Objective",
    "TrainingProgress",
    "make_objective",
]
