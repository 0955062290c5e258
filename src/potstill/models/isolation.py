"""Find out by trial which tokens a model reads besides those of the same conversation.

Architectures differ: some take the borders between packed conversations from the positions, some
ignore them without an error (OPT, BLOOM and gpt-oss in transformers 5.24). So the model is run:
a few tokens are changed, and the states of other tokens must stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from potstill.models.heads import (
    has_variable_length,
    hidden_states,
    model_inputs,
    on_device,
    unwrapped,
)
from potstill.models.vocabulary import embedding_rows
from potstill.protocols import Batch, CausalLM

LENGTH, BEGIN = 8, 5
"""Tokens of a row, and where the second conversation begins."""
TOLERANCE = 1e-3
"""Relative to the change of the changed tokens; rounding in mixtures of experts is below it."""
ALONE_TOLERANCE = {"full": 1e-3, "half": 5e-2}
"""Relative to the states. A batch of another shape rounds differently."""


@dataclass(frozen=True)
class Isolation:
    """What a model can be given without a mask."""

    packed: bool
    """Several conversations in a row, each with positions from 0, do not see each other."""
    padded: bool
    """Padding after a conversation, its positions running on, is not seen."""


@torch.no_grad()
def isolation(model: CausalLM, *, one_row: bool = False, bounds: bool = False) -> Isolation:
    """Run ``model`` five times on at most 2 rows of 8 tokens.

    ``one_row``: what matters is a batch of one row, as for variable-length attention kernels;
    ``bounds``: it says where the conversations begin.
    """
    inner = unwrapped(model)
    if inner.device.type == "meta":  # without weights nothing can be tried
        return Isolation(packed=False, padded=False)
    was_training = inner.training
    inner.eval()
    try:
        with _computable(inner):
            packed = _is_packed_apart(inner, one_row, bounds)
            return Isolation(packed, _is_padding_unseen(inner))
    finally:
        inner.train(was_training)


@contextlib.contextmanager
def _computable(model: Any) -> Iterator[None]:
    """Let a model with a variable-length kernel run: on a GPU in 16 bits, on a CPU without it."""
    kernel = model.config._attn_implementation if has_variable_length(model) else ""
    if model.device.type != "cpu":
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(kernel)):
            yield
    elif kernel.startswith("flash_attention") or "/" in kernel:
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(kernel)
    else:
        yield


def _is_packed_apart(model: Any, one_row: bool, bounds: bool) -> bool:
    """Return whether the second conversation of a row has the states that it has alone."""
    ids, other = _token_ids(model)
    positions = torch.tensor([*range(BEGIN), *range(LENGTH - BEGIN)]).expand(2, -1)
    if one_row:
        ids, other, positions = ids[-1:], other[-1:], positions[-1:]
    changed = torch.cat([other[:, :BEGIN], ids[:, BEGIN:]], dim=1)
    ends = [0, BEGIN, LENGTH] if bounds else None
    first, second = (_states(model, batch, positions, ends) for batch in (ids, changed))
    alone = _states(model, ids[-1:, BEGIN:], positions[-1:, BEGIN:])
    seen = _distance(first[:, BEGIN:], second[:, BEGIN:])
    moved = _distance(first[:, :BEGIN], second[:, :BEGIN])
    is_full = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    precision = "full" if is_full else "half"
    misplaced = _distance(first[-1:, BEGIN:], alone) / float(torch.linalg.vector_norm(alone))
    return bool(seen <= TOLERANCE * moved) and bool(misplaced <= ALONE_TOLERANCE[precision])


def _is_padding_unseen(model: Any) -> bool:
    ids, other = _token_ids(model)
    positions = torch.arange(LENGTH).expand(2, -1)
    changed = torch.cat([ids[:, :BEGIN], other[:, BEGIN:]], dim=1)
    first, second = (_states(model, batch, positions) for batch in (ids, changed))
    seen = _distance(first[:, :BEGIN], second[:, :BEGIN])
    return bool(seen <= TOLERANCE * _distance(first[:, BEGIN:], second[:, BEGIN:]))


def _states(
    model: CausalLM, ids: Tensor, positions: Tensor, ends: list[int] | None = None
) -> Tensor:
    batch = cast(Batch, {"input_ids": ids, "position_ids": positions})
    if ends is not None:
        batch["cu_seq_lens"] = torch.tensor(ends, dtype=torch.int32)
        batch["longest"] = max(stop - start for start, stop in itertools.pairwise(ends))
    states = hidden_states(model, model_inputs(on_device(batch, model.device)))
    return states.to("cpu", torch.float32)


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other))


def _token_ids(model: Any) -> tuple[Tensor, Tensor]:
    """Return two batches ``[2, 8]`` that differ in each token, without ids that mean an image."""
    configs = (model.config, model.config.get_text_config())
    named = {
        value
        for config in configs
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    plain = [i for i in range(min(embedding_rows(model), 256)) if i not in named]
    ids = torch.tensor([plain[i % len(plain)] for i in range(4 * LENGTH)]).view(2, 2, LENGTH)
    return ids[0], ids[1]
