"""Check that a model's logits are those of its head: an architecture may change them further."""

from __future__ import annotations

import torch
from torch import nn

from potstill.errors import NonFiniteLoss, SelfCheckFailed
from potstill.models.heads import head_logits, unwrapped
from potstill.protocols import Batch

TOKENS = 64
LOGITS_TOLERANCE = {"full": 1e-3, "half": 2e-2}
"""Relative to the largest logit."""


@torch.no_grad()
def check_logits(name: str, model: nn.Module, ids: list[int], device: torch.device | str) -> None:
    """Compare a model's own logits for a few token ids with those that the losses compute.

    ``name`` says in errors whose they are. Raises: SelfCheckFailed if they differ; NonFiniteLoss if
    they are not finite.
    """
    inputs: Batch = {"input_ids": torch.tensor([ids[:TOKENS]], device=device)}
    expected = model(**inputs, use_cache=False).logits[0].float()
    dtype = working_dtype(model, device)
    if not expected.amax(-1).isfinite().all():
        found = f"the logits of the {name} {unwrapped(model).config.name_or_path} are NaN or"
        raise NonFiniteLoss(
            f"{found} infinite in {str(dtype).removeprefix('torch.')}; use --precision bf16 or "
            "fp32, or check its weights"
        )
    computed = head_logits(model, inputs)[0, :, : expected.shape[-1]].float().to(expected.device)
    error = float((expected - computed).abs().max() / expected.abs().max().clamp_min(1e-6))
    if error > LOGITS_TOLERANCE[precision_of(dtype)]:
        raise SelfCheckFailed(
            f"self-check: the logits of the {name}, {type(unwrapped(model)).__name__}, are "
            f"{error:.1%} off those of its head: its architecture has an operation on logits that "
            "potstill does not know (a scale, a cap); open an issue with its config.json"
        )


def precision_of(dtype: torch.dtype) -> str:
    """Return ``half`` or ``full``, the key of a tolerance."""
    return "half" if dtype in (torch.bfloat16, torch.float16) else "full"


def working_dtype(model: nn.Module, device: torch.device | str) -> torch.dtype:
    """Return the dtype that the model computes in: autocast's if it is on."""
    kind = torch.device(device).type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return next(model.parameters()).dtype
