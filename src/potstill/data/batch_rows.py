"""Find the conversations of a batch again, however they were laid out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np

from potstill.data.encoding import IGNORED
from potstill.protocols import Batch


def batch_rows(batch: Batch) -> Iterator[dict[str, list[int]]]:
    """Yield ``input_ids`` and ``labels`` of each conversation, in the batch's order."""
    ids, labels = (batch[name].cpu().numpy() for name in ("input_ids", "labels"))
    lengths = _lengths(batch)
    positions = batch["position_ids"].cpu().numpy() if "position_ids" in batch else None
    for row in range(len(ids)):
        end = ids.shape[1] if lengths is None else int(lengths[row])
        starts = [0] if positions is None else np.flatnonzero(positions[row, :end] == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            own = labels[row, start:stop].copy()
            own[:1] = IGNORED
            if (own != IGNORED).any():  # padding at the end of a packed row has none
                yield {"input_ids": ids[row, start:stop].tolist(), "labels": own.tolist()}


def _lengths(batch: Batch) -> list[int] | None:
    """Return the tokens of each row without its padding; None for packed rows."""
    if "lengths" in batch:
        return cast(list[int], batch["lengths"].tolist())
    return batch["attention_mask"].sum(1).tolist() if "attention_mask" in batch else None
