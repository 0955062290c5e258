"""Define the losses: differentiable, in nats, one number per token or summed over tokens.

Names are imported when they are first used: the records of the divergences need no torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

from potstill.lazy import imported

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
    "CallableHead": "potstill.losses.projection",
    "DIVERGENCES": "potstill.losses.records",
    "Divergence": "potstill.losses.records",
    "Head": "potstill.losses.projection",
    "Places": "potstill.losses.cross_tokenizer",
    "Projection": "potstill.losses.projection",
    "forward_kl": "potstill.losses.divergences",
    "fused_linear_cells": "potstill.losses.cross_tokenizer",
    "fused_linear_cross_entropy": "potstill.losses.fused",
    "fused_linear_divergence": "potstill.losses.fused",
    "fused_linear_loss": "potstill.losses.fused",
    "fused_linear_topk": "potstill.losses.partitions",
    "jensen_shannon": "potstill.losses.divergences",
    "reverse_kl": "potstill.losses.divergences",
    "skew_forward_kl": "potstill.losses.divergences",
    "skew_reverse_kl": "potstill.losses.divergences",
    "total_variation": "potstill.losses.divergences",
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
    if name in _MOVED:
        warnings.warn(
            f"potstill.losses.{name} is now potstill.baselines.{name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module("potstill.baselines"), name)
    return imported(name, "potstill.losses", _HOME)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
