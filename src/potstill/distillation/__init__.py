"""A run: data → training → student → evaluation → report (run.py, training.py, settings.py)."""

from potstill.distillation.held_out import split_data as split_data
from potstill.distillation.run import Run as Run
from potstill.distillation.run import distill as distill
from potstill.distillation.run import run_distillation as run_distillation
from potstill.distillation.settings import DistillSettings as DistillSettings
from potstill.distillation.targets import opener_of as opener_of
from potstill.distillation.training import check_pair as check_pair

__all__ = [
    "DistillSettings",
    "Run",
    "check_pair",
    "distill",
    "opener_of",
    "run_distillation",
    "split_data",
]
