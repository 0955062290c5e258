"""A run: data → training → student → evaluation → report (run.py, training.py, settings.py).

Names are imported when they are first used: the settings need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potstill.lazy import imported

if TYPE_CHECKING:
    from potstill.distillation.held_out import split_data as split_data
    from potstill.distillation.run import Run as Run
    from potstill.distillation.run import distill as distill
    from potstill.distillation.run import run_distillation as run_distillation
    from potstill.distillation.settings import DistillSettings as DistillSettings
    from potstill.distillation.targets import opener_of as opener_of
    from potstill.distillation.training import check_pair as check_pair

_HOME = {
    "DistillSettings": "potstill.distillation.settings",
    "Run": "potstill.distillation.run",
    "check_pair": "potstill.distillation.training",
    "distill": "potstill.distillation.run",
    "opener_of": "potstill.distillation.targets",
    "run_distillation": "potstill.distillation.run",
    "split_data": "potstill.distillation.held_out",
}

__all__ = [
    "DistillSettings",
    "Run",
    "check_pair",
    "distill",
    "opener_of",
    "run_distillation",
    "split_data",
]


def __getattr__(name: str) -> object:
    return imported(name, "potstill.distillation", _HOME)
