"""Kernels in Triton that compute a loss and its gradient from rows of logits on a GPU.

In torch, a divergence of logits ``[b, V]`` is some ten operations, each of which reads and writes
tensors of b × V numbers. A kernel reads the logits two or three times and writes the gradient once,
over the student's logits.

The environment variable ``POTSTILL_KERNELS`` is ``auto`` (on CUDA, if triton is installed), ``off``
or ``interpret`` (on every device, by Triton's interpreter, which is slow and made for tests).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

VARIABLE = "POTSTILL_KERNELS"
CHOICES = ("auto", "off", "interpret")


def kernels_for(*logits: Tensor) -> ModuleType | None:
    """Return the module with kernels for all these logits; None if torch is to compute them.

    Raises: ValueError for an unknown value of ``POTSTILL_KERNELS``.
    """
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen not in CHOICES:
        raise ValueError(f"{VARIABLE} = {chosen!r}: must be one of {', '.join(CHOICES)}")
    usable = all(one.dtype == torch.float32 and one.stride(-1) == 1 for one in logits)
    if chosen == "off" or not usable:
        return None
    if chosen == "interpret":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        return _rows()
    return _rows() if all(one.is_cuda for one in logits) and _has_triton() else None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _rows() -> ModuleType:
    from potstill.losses.kernels import rows

    return rows
