"""A batch of growing answers whose rows come and go.

B rows, T columns of the cache, V vocabulary. Columns stand on the right edge: all rows take their next token at column T.

    row 0  ▓▓▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓▓▓▓▓        A newcomer's prompt is laid against that edge. What lies left of a row is masked, and its
    row 1  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓│▓▓▓        positions count from 0, so where it stands changes nothing but rounding.
    row 2  ░░░░░░░▓▓▓▓▓▓▓▓▓▓▓▓│▓▓▓        Columns that nobody has any more are cut off on the left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from potstill.models.heads import carries_state

Choose = Callable[[Tensor, Sequence["Row"]], None]
"""Takes logits ``[B, V]`` and gives each row its next token."""


class Row:
    """A prompt and as much of its answer as there is, in token ids."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.tokens = prompt, list[int]()


class Batch:
    """Rows and their cache. ``choose`` is called with the logits of each forward pass."""

    def __init__(self, model: Any, pad_token_id: int, choose: Choose) -> None:
        self.model, self.pad_token_id, self.choose = model, pad_token_id, choose
        self.rows: list[Row] = []
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self.cache: Any = None
        self.is_recurrence = not hasattr(model.config.get_text_config(), "num_attention_heads")
        # transformers calls it `cache` of late.
        self.cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def add(self, rows: Sequence[Row]) -> None:
        """Read the prompts of ``rows``, take their first tokens, and let them join."""
        if not rows:
            return
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.prompt) for row in rows], batch_first=True, padding_value=self.pad_token_id, padding_side="left"
        )
        columns = torch.arange(ids.shape[1])
        lengths = torch.tensor([[len(row.prompt)] for row in rows])
        mask = (columns >= ids.shape[1] - lengths).long()
        # A model that keeps a state makes its own cache. Else every column is kept, in sliding layers too, so that rows can move.
        cache = DynamicCache(config=self.model.config) if carries_state(self.model) else DynamicCache()
        mask = mask.to(self.model.device)
        self.choose(self._forward(ids.to(self.model.device), mask, cache), rows)
        self.cache = _join(self.cache, cache) if self.rows else cache
        self.mask = torch.cat(_right_aligned(self.mask, mask, dim=1)) if self.rows else mask
        self.rows += rows

    def step(self) -> None:
        """One more token for every row."""
        self.mask = pad(self.mask, (0, 1), value=1)
        last = torch.tensor([row.tokens[-1:] for row in self.rows], device=self.model.device)
        self.choose(self._forward(last, self.mask, self.cache), self.rows)

    def keep(self, rows: Sequence[Row]) -> None:
        """Let all rows but these go, and with them the columns that were theirs alone."""
        kept = set(map(id, rows))
        places = torch.tensor([i for i, row in enumerate(self.rows) if id(row) in kept], dtype=torch.long, device=self.mask.device)
        self.rows = list(rows)
        if not rows:
            return
        self.mask = self.mask[places]
        first = int(self.mask.any(0).long().argmax())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[places, :, first:], layer.values[places, :, first:]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """The logits of the last column, ``[B, V]`` in float32; ``cache`` grows by the columns of ``ids``."""
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        more = {self.cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
        # A mere recurrence has the padding behind it when it takes one token, and would be confused by a mask of many.
        seen = None if self.is_recurrence and ids.shape[1] == 1 else mask
        logits: Tensor = self.model(input_ids=ids, attention_mask=seen, position_ids=positions, **more).logits
        return logits[:, -1].float()


def _join(cache: Any, other: Any) -> Any:
    for layer, joining in zip(cache.layers, other.layers, strict=True):
        layer.keys = torch.cat(_right_aligned(layer.keys, joining.keys, dim=2))
        layer.values = torch.cat(_right_aligned(layer.values, joining.values, dim=2))
    return cache


def _right_aligned(one: Tensor, other: Tensor, *, dim: int) -> list[Tensor]:
    """Both, the shorter in ``dim`` filled with zeros on its left."""
    length = max(one.shape[dim], other.shape[dim])
    behind = (0, 0) * (one.dim() - 1 - dim)
    return [pad(tensor, (*behind, length - tensor.shape[dim], 0)) for tensor in (one, other)]
