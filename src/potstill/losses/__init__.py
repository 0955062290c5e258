"""Define the losses: differentiable, in nats, one number per token or summed over tokens.

Names are imported when they are first used: the records of the divergences need no torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potstill.losses.cross_tokenizer import Places as Places
    from potstill.losses.cross_tokenizer import fused_linear_cells as fused_linear_cells
    from potstill.losses.divergences import forward_kl as forward_kl
    from potstill.losses.divergences import jensen_shannon as jensen_shannon
    from potstill.losses.divergences import reverse_kl as reverse_kl
    from potstill.losses.divergences import skew_forward_kl as skew_forward_kl
    from potstill.losses.divergences import skew_reverse_kl as skew_reverse_kl
    from potstill.losses.divergences import total_variation as total_variation
    from potstill.losses.fused import fused_linear_cross_entropy as fused_linear_cross_entropy
    from potstill.losses.fused import fused_linear_divergence as fused_linear_divergence
    from potstill.losses.fused import fused_linear_loss as fused_linear_loss
    from potstill.losses.partitions import fused_linear_topk as fused_linear_topk
    from potstill.losses.projection import CallableHead as CallableHead
    from potstill.losses.projection import Head as Head
    from potstill.losses.projection import Projection as Projection
    from potstill.losses.records import DIVERGENCES as DIVERGENCES
    from potstill.losses.records import Divergence as Divergence

_HOME = {
    "CallableHead": "projection",
    "DIVERGENCES": "records",
    "Divergence": "records",
    "Head": "projection",
    "Places": "cross_tokenizer",
    "Projection": "projection",
    "forward_kl": "divergences",
    "fused_linear_cells": "cross_tokenizer",
    "fused_linear_cross_entropy": "fused",
    "fused_linear_divergence": "fused",
    "fused_linear_loss": "fused",
    "fused_linear_topk": "partitions",
    "jensen_shannon": "divergences",
    "reverse_kl": "divergences",
    "skew_forward_kl": "divergences",
    "skew_reverse_kl": "divergences",
    "total_variation": "divergences",
}

__all__ = [
    "DIVERGENCES",
    "CallableHead",
    "Divergence",
    "Head",
    "Places",
    "Projection",
    "forward_kl",
    "fused_linear_cells",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_loss",
    "fused_linear_topk",
    "jensen_shannon",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]


_MOVED = ("fused_linear_chunks", "fused_linear_last_token", "fused_linear_sorted")
"""Names that are in potstill.baselines now."""


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"potstill.losses.{_HOME[name]}"), name)
    if name in _MOVED:
        warnings.warn(
            f"potstill.losses.{name} is now potstill.baselines.{name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module("potstill.baselines"), name)
    raise AttributeError(f"module 'potstill.losses' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
