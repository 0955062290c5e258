"""Training: what is learned (objectives.py, cross_objective.py), that it is sound (self_check.py), and the Trainer (trainer.py)."""

from potstill.training.objectives import METHODS, Objective, make_objective
from potstill.training.trainer import DistillationConfig, DistillationTrainer, MetricsFile, ProgressBar

__all__ = [
    "METHODS",
    "DistillationConfig",
    "DistillationTrainer",
    "MetricsFile",
    "Objective",
    "ProgressBar",
    "make_objective",
]
