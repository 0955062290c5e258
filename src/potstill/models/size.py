"""Estimate whether a model fits in a device's memory, before it is opened."""

from __future__ import annotations

from typing import Any

from potstill.models.explained import Source
from potstill.models.opener import ModelOpener
from potstill.models.quantized import import_quietly, without_quantization
from potstill.models.sources import pick_device

MARGIN = 1.15
"""Memory for activations and copies, as a factor of the weights."""


def weight_bytes(config: Any, dtype: str, *, trust_remote_code: bool = False) -> int:
    """Return the bytes of a model's weights in ``dtype``; ``auto`` is the saved one."""
    import torch

    import_quietly("transformers.modeling_utils")
    from transformers import AutoModelForCausalLM

    plain = without_quantization(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code)
    saved = getattr(config.get_text_config(), "dtype", None) or torch.float32
    chosen = saved if dtype == "auto" else getattr(torch, dtype)
    return int(model.num_parameters()) * int(chosen.itemsize)


def fits_in_memory(source: Source, opener: ModelOpener) -> bool:
    """Return whether the weights fit into the free memory of the opener's device.

    Memory that cannot be asked for (mps) counts as enough.
    """
    import psutil
    import torch

    device = pick_device(opener.device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return True
    trust = opener.trust_remote_code
    need = weight_bytes(opener.config(source), opener.dtype, trust_remote_code=trust)
    return bool(MARGIN * need <= free)
