"""Generate the answers of a batch together; rows can join and leave between two tokens.

B rows, T columns of the cache, V vocabulary. Rows are right-aligned: all take their next token at
column T.

    row 0  ▓▓▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓▓▓▓▓    A new prompt is aligned to the right edge. Columns left of a
    row 1  ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓│▓▓▓    row are masked and its positions count from 0, so shifting it
    row 2  ░░░░░░░▓▓▓▓▓▓▓▓▓▓▓▓│▓▓▓    changes only rounding. Unused left columns are cut off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from potstill.models.heads import carries_state, refuse_infinite_logits

Choose = Callable[[Tensor, Sequence["Row"]], None]
"""Choose a token for each row from logits ``[B, V]`` and append it."""


class Row:
    """A prompt and its answer so far, in token ids."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.tokens = prompt, list[int]()


class AnswerBatch:
    """Hold rows and their cache; call ``choose`` with the logits of each forward pass."""

    def __init__(self, model: Any, pad_token_id: int, choose: Choose) -> None:
        self.model, self.pad_token_id, self.choose = model, pad_token_id, choose
        self.rows: list[Row] = []
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self.cache = DynamicCache()
        self.is_recurrence = not hasattr(model.config.get_text_config(), "num_attention_heads")
        arguments = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in arguments else "past_key_values"

    def add(self, rows: Sequence[Row]) -> None:
        """Run the prompts of ``rows``, choose their first tokens, and add them to the batch."""
        if not rows:
            return
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.prompt) for row in rows],
            batch_first=True,
            padding_value=self.pad_token_id,
            padding_side="left",
        ).to(self.model.device)
        lengths = torch.tensor([[len(row.prompt)] for row in rows], device=ids.device)
        columns = torch.arange(ids.shape[1], device=ids.device)
        mask = (columns >= ids.shape[1] - lengths).long()
        # A recurrent model needs the cache of its config. Otherwise every column is cached, also in
        # sliding-window layers, so that rows can be shifted.
        stateful = carries_state(self.model)
        cache = DynamicCache(config=self.model.config) if stateful else DynamicCache()
        self.choose(self._forward(ids, mask, cache), rows)
        self.cache = _join(self.cache, cache) if self.rows else cache
        self.mask = torch.cat(_right_aligned(self.mask, mask, dim=1)) if self.rows else mask
        self.rows += rows

    def step(self) -> None:
        """Add one token to every row."""
        self.mask = pad(self.mask, (0, 1), value=1)
        last = torch.tensor([row.tokens[-1:] for row in self.rows], device=self.model.device)
        self.choose(self._forward(last, self.mask, self.cache), self.rows)

    def keep(self, rows: Sequence[Row]) -> None:
        """Remove all other rows, and the columns that only they used."""
        kept = set(map(id, rows))
        indices = [i for i, row in enumerate(self.rows) if id(row) in kept]
        index = torch.tensor(indices, dtype=torch.long, device=self.mask.device)
        self.rows = list(rows)
        if not rows:
            return
        self.mask = self.mask[index]
        first = int(self.mask.any(0).long().argmax())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            layer.keys = layer.keys[index, :, first:]
            layer.values = layer.values[index, :, first:]

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Return the last column's logits ``[B, V]``, float32; extend the cache.

        Raises: ModelError if they are not finite.
        """
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        more = {self.cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
        # A pure recurrence has already processed the padding and takes no mask for one token.
        passed_mask = None if self.is_recurrence and ids.shape[1] == 1 else mask
        inputs = {"input_ids": ids, "attention_mask": passed_mask, "position_ids": positions}
        logits: Tensor = self.model(**inputs, **more).logits
        last = logits[:, -1].float()
        refuse_infinite_logits(self.model, last)
        return last


def _join(cache: DynamicCache, other: DynamicCache) -> DynamicCache:
    """Append the rows of ``other`` to ``cache``."""
    for layer, other_layer in zip(cache.layers, other.layers, strict=True):
        layer.keys = torch.cat(_right_aligned(layer.keys, other_layer.keys, dim=2))
        layer.values = torch.cat(_right_aligned(layer.values, other_layer.values, dim=2))
    return cache


def _right_aligned(one: Tensor, other: Tensor, *, dim: int) -> list[Tensor]:
    """Return both tensors; pad the one shorter in ``dim`` with zeros on the left."""
    length = max(one.shape[dim], other.shape[dim])
    later_dims = (0, 0) * (one.dim() - 1 - dim)
    return [pad(tensor, (*later_dims, length - tensor.shape[dim], 0)) for tensor in (one, other)]
