"""Find out by trial which tokens a model reads besides those of the same conversation.

Architectures differ: some take the borders between packed conversations from the positions, some
ignore them without an error (OPT, BLOOM and gpt-oss in transformers 5.24). So the model is run:
a few tokens are changed, and the states of other tokens must stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from potstill.models.heads import hidden_states, on_device, unwrapped
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
def isolation(model: CausalLM, *, one_row: bool = False) -> Isolation:
    """Run ``model`` four times on at most 2 rows of 8 tokens.

    ``one_row``: what matters is a batch of one row, as for variable-length attention kernels.
    """
    inner = unwrapped(model)
    if inner.device.type == "meta":  # without weights nothing can be tried
        return Isolation(packed=False, padded=False)
    was_training = inner.training
    inner.eval()
    try:
        return Isolation(_is_packed_apart(inner, one_row), _is_padding_unseen(inner))
    finally:
        inner.train(was_training)


def _is_packed_apart(model: Any, one_row: bool) -> bool:
    """Return whether the second conversation of a row has the states that it has alone."""
    ids, other = _token_ids(model)
    positions = torch.tensor([*range(BEGIN), *range(LENGTH - BEGIN)]).expand(2, -1)
    if one_row:
        ids, other, positions = ids[-1:], other[-1:], positions[-1:]
    changed = torch.cat([other[:, :BEGIN], ids[:, BEGIN:]], dim=1)
    first, second = (_states(model, batch, positions) for batch in (ids, changed))
    alone = _states(model, ids[-1:, BEGIN:], positions[-1:, BEGIN:])
    seen = _distance(first[:, BEGIN:], second[:, BEGIN:])
    moved = _distance(first[:, :BEGIN], second[:, :BEGIN])
    precision = "full" if model.dtype == torch.float32 else "half"
    misplaced = _distance(first[-1:, BEGIN:], alone) / float(torch.linalg.vector_norm(alone))
    return bool(seen <= TOLERANCE * moved) and bool(misplaced <= ALONE_TOLERANCE[precision])


def _is_padding_unseen(model: Any) -> bool:
    ids, other = _token_ids(model)
    positions = torch.arange(LENGTH).expand(2, -1)
    changed = torch.cat([ids[:, :BEGIN], other[:, BEGIN:]], dim=1)
    first, second = (_states(model, batch, positions) for batch in (ids, changed))
    seen = _distance(first[:, :BEGIN], second[:, :BEGIN])
    return bool(seen <= TOLERANCE * _distance(first[:, BEGIN:], second[:, BEGIN:]))


def _states(model: CausalLM, ids: Tensor, positions: Tensor) -> Tensor:
    inputs = cast(Batch, {"input_ids": ids, "position_ids": positions})
    states = hidden_states(model, on_device(inputs, model.device))
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
