"""Compute one shard of a capture: the teacher's outputs for a few conversations, as tensors.

A shard depends on its conversations and the teacher alone, so any process can compute it
(format: captured.py). N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.data import IGNORED, BatchLayout
from potstill.errors import ModelError
from potstill.models.heads import on_device, output_head
from potstill.progress import Progress
from potstill.teachers.captured import quantize, row_key
from potstill.teachers.local import LocalTeacher
from potstill.teachers.sparse import encode_sparse

BATCH_TOKENS = 4096
Encoded = dict[str, Any]


@dataclass(frozen=True)
class ShardMaker:
    """Make shards that keep what ``keep`` says (`potstill capture --keep`)."""

    keep: str
    threshold: float
    """For ``sparse``."""
    pad_token_id: int
    rotation: Tensor | None = None
    """For ``states8``, ``[H, H]``."""

    def make(
        self,
        teacher: LocalTeacher,
        rows: Sequence[Encoded],
        *,
        observe: Callable[[Tensor], None] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        """Return the tensors of a shard; ``observe`` is called with the states ``[N, H]``.

        Raises: ModelError for states that are not finite.
        """
        keys: list[bytes] = []
        sizes, parts = [0], []
        for batch_rows in _batches(rows):
            found = [row_key(row) for row in batch_rows]
            keys += [key for key, _ in found]
            sizes += [count for _, count in found]
            states, labels = self._states(teacher, batch_rows)
            if observe is not None:
                observe(states)
            parts.append(self._kept(teacher, states, labels, found))
            if progress is not None:
                progress.update(len(batch_rows))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name in ("mass_starts", "id_starts"):
            if name in tensors:
                tensors[name] = torch.cat(
                    [torch.zeros(1, dtype=torch.int64), tensors[name]]
                ).cumsum(0)
        keys_array = np.frombuffer(b"".join(keys), dtype=np.uint8).copy()
        tensors["keys"] = torch.from_numpy(keys_array).view(len(keys), -1)
        tensors["starts"] = torch.tensor(sizes).cumsum(0)
        return tensors

    def _states(self, teacher: LocalTeacher, rows: list[Encoded]) -> tuple[Tensor, Tensor]:
        """Return the states ``[N, H]`` and labels ``[N]`` of a batch's supervised tokens."""
        layout = BatchLayout(self.pad_token_id, packed=False)
        batch = on_device(layout(rows), teacher.model.device)
        states, labels = teacher.targets(batch).hidden, batch["labels"][:, 1:]
        if not bool(torch.isfinite(states).all()):
            dtype = str(teacher.model.dtype).removeprefix("torch.")
            raise ModelError(
                f"{teacher.model.config.name_or_path}: its hidden states are not finite in "
                f"{dtype}; use --precision bf16 or fp32"
            )
        return states, labels[labels != IGNORED]

    def _kept(
        self,
        teacher: LocalTeacher,
        states: Tensor,
        labels: Tensor,
        found: list[tuple[bytes, int]],
    ) -> dict[str, Tensor]:
        """Return what is kept of one batch; ``found`` are keys and numbers of tokens."""
        if self.keep == "states":
            return {"hidden": states.cpu()}
        if self.keep == "states8":
            assert self.rotation is not None, "written with the head"
            hidden, scales = quantize(states.cpu(), self.rotation)
            return {"hidden": hidden, "scales": scales}
        head, columns = output_head(teacher.model), []
        sizes = [count for _, count in found]
        pairs = zip(torch.split(states, sizes), torch.split(labels, sizes), found, strict=True)
        for part, part_labels, (key, _) in pairs:
            seed = int.from_bytes(key[:8], "little")
            columns.append(
                encode_sparse(part, head, part_labels, threshold=self.threshold, seed=seed)
            )
        kept = {
            name: torch.from_numpy(np.concatenate([one[name] for one in columns]))
            for name in columns[0]
        }
        for name, column in (("mass_starts", "masses"), ("id_starts", "ids")):
            kept[name] = torch.tensor([len(one[column]) for one in columns])
        return kept


def _batches(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """Return batches of conversations of similar length, of at most `BATCH_TOKENS` tokens."""
    batches: list[list[Encoded]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if batches and len(row["input_ids"]) * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
