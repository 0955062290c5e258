"""A teacher on disk: what it knows at the supervised tokens of conversations, and its LM head.

CAPTURE_DIR/
  manifest.json       the teacher, what is kept, hashes, counts, and a checksum for each shard
  head.safetensors    the LM head, and for `states8` the rotation of the states
  tokenizer/          the teacher's tokenizer and chat template
  shards/*.safetensors
      keys    [C, 16]  which conversation (`conversation_key`), uint8
      starts  [C + 1]  its first row in the tensors below, int64
      hidden  [N, H]   the input of the LM head; int8 if `states8` was kept
      scales  [N, 1]   the factor of each int8 row, float32 (`states8` alone)
      for `sparse` instead of `hidden`: bytes of `sparse.py`, with `mass_starts` and `id_starts`

A conversation is found by its token ids and its supervised positions, so the order of the data, the
number of passes, the batch size and packing do not matter. C conversations, N tokens, H hidden
size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from potstill.data import IGNORED
from potstill.data.batch_rows import batch_rows
from potstill.errors import DataError, ModelError
from potstill.losses import Head
from potstill.models import ModelOpener
from potstill.protocols import Batch, Tokenizer
from potstill.shards import checksum
from potstill.teachers import stored_head
from potstill.teachers.sparse import PER_TOKEN, SparseTarget, decode_sparse, join
from potstill.teachers.targets import LossSettings, StatesTarget

FORMAT = 1
KEEPS = ("states", "states8", "sparse")
KEY_BYTES = 16


@dataclass(frozen=True)
class CaptureFolder:
    """The paths of a capture, and its manifest."""

    path: Path

    @property
    def manifest_file(self) -> Path:
        """Everything that is known about the capture, as JSON."""
        return self.path / "manifest.json"

    @property
    def head(self) -> Path:
        """The teacher's LM head."""
        return self.path / stored_head.HEAD

    @property
    def tokenizer(self) -> Path:
        """The teacher's tokenizer."""
        return self.path / stored_head.TOKENIZER

    def shard(self, name: str) -> Path:
        """Return the file of a shard."""
        return self.path / "shards" / name

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest. Raises: ModelError if it is missing, damaged or too new."""
        try:
            manifest: dict[str, Any] = json.loads(self.manifest_file.read_bytes())
            found = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{self.manifest_file}: damaged or missing; capture again in a new folder"
            ) from error
        if found != FORMAT:
            raise ModelError(
                f"{self.manifest_file}: format {found}, and this version reads format {FORMAT}; "
                "update potstill, or capture again"
            )
        return manifest


def is_capture(source: str) -> bool:
    """Return whether ``source`` is the folder of a capture."""
    file = Path(source).expanduser() / "manifest.json"
    try:
        return file.is_file() and json.loads(file.read_bytes()).get("kind") == "capture"
    except (OSError, ValueError, AttributeError):
        return False


def captured_keep(source: str) -> str | None:
    """Return what a capture keeps; None if ``source`` is not a capture."""
    if not is_capture(source):
        return None
    keep: str = CaptureFolder(Path(source).expanduser()).read_manifest()["keep"]
    return keep


def conversation_key(ids: Iterable[int], supervised: Iterable[bool]) -> bytes:
    """Return 16 bytes that identify a conversation by what the teacher reads and is asked.

    >>> one = conversation_key([5, 6, 7], [False, False, True])
    >>> one == conversation_key([5, 6, 7], [False, True, True])
    False
    """
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=KEY_BYTES)
    digest.update(np.asarray(supervised, dtype=bool).tobytes())
    return digest.digest()


def row_key(row: dict[str, Any]) -> tuple[bytes, int]:
    """Return the key and the number of supervised tokens of an encoded conversation.

    A row for two tokenizers is read with the teacher's.
    """
    prefix = "teacher_" if "teacher_input_ids" in row else ""
    supervised = np.asarray(row[f"{prefix}labels"]) != IGNORED
    supervised[:1] = False
    return conversation_key(row[f"{prefix}input_ids"], supervised), int(supervised.sum())


def batch_keys(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """Yield key and number of supervised tokens of each conversation, in the batch's order."""
    for row in batch_rows(batch):
        supervised = np.asarray(row["labels"]) != IGNORED
        yield conversation_key(row["input_ids"], supervised), int(supervised.sum())


class CapturedTeacher:
    """Give the targets of conversations that were captured. It has no model.

    Raises: ModelError for a folder that is damaged.
    """

    model: None = None
    reads_new_text = False

    def __init__(self, path: Path, *, tokenizer: Tokenizer | None = None) -> None:
        self.folder, self.tokenizer = CaptureFolder(path), tokenizer
        self.manifest = self.folder.read_manifest()
        self.head, self.rotation = read_head(self.folder, self.manifest)
        self.dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        self._heads: dict[torch.device, Head] = {}
        self._open: dict[str, Any] = {}
        self._places: dict[bytes, tuple[str, int, int, int]] = {}
        for name in self.manifest["shards"]:
            with open_shard(self.folder, name, self.manifest) as shard:
                starts = shard.get_tensor("starts").tolist()
                keys = shard.get_tensor("keys").numpy()
            for i, (key, start, stop) in enumerate(zip(keys, starts, starts[1:], strict=False)):
                self._places[key.tobytes()] = (name, i, start, stop)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the head."""
        return len(self.head)

    def __len__(self) -> int:
        return len(self._places)

    def targets(self, batch: Batch) -> StatesTarget | SparseTarget:
        """Return what is kept for the supervised positions. Raises: DataError if there is nothing.

        It does not depend on the rest of the batch: a teacher reads each conversation alone.
        """
        device = batch["labels"].device
        places = [self._place(key, count) for key, count in batch_keys(batch)]
        if self.manifest["keep"] == "sparse":
            return join([self._sparse(*place) for place in places], device)
        parts = [self._states(*place) for place in places]
        empty = torch.zeros(0, self.head.weight.shape[1], dtype=self.dtype)
        return StatesTarget(torch.cat([empty, *parts]).to(device), self._head_on(device))

    def require(self, rows: Iterable[dict[str, Any]], loss: LossSettings | None = None) -> None:
        """Check that all encoded conversations were captured, and their shards are whole.

        ``loss``, if given, must be one that the kept targets can give. Raises: DataError with the
        number of missing conversations and the beginning of the first; ModelError for a damaged
        shard; ConfigError for the loss.
        """
        if loss is not None and self.manifest["keep"] == "sparse":
            SparseTarget.refuse(loss)
        missing, first, total, shards = 0, None, 0, set()
        for row in rows:
            key, count = row_key(row)
            if not count:
                continue
            total += 1
            if key in self._places:
                shards.add(self._places[key][0])
            else:
                missing, first = missing + 1, first or row
        # A flipped bit in a key makes a conversation look missing: check all files first.
        for name in sorted(shards if first is None else self.manifest["shards"]):
            self._shard(name)
        if first is not None:
            raise DataError(self._missing(missing, total, first))

    def _missing(self, missing: int, total: int, row: dict[str, Any]) -> str:
        ids = row.get("teacher_input_ids", row["input_ids"])
        begin = "" if self.tokenizer is None else f", first {self.tokenizer.decode(ids)[:80]!r}"
        return (
            f"{self.folder.path}: {missing} of {total} conversations were not captured{begin}; "
            f"capture them (potstill capture with the same data, chat template and --max-length "
            f"{self.manifest['max_length']}), or name the teacher as --teacher-model"
        )

    def _place(self, key: bytes, count: int) -> tuple[str, int, int, int]:
        if key not in self._places:
            raise DataError(
                f"{self.folder.path}: a conversation of this batch was not captured; "
                "run potstill capture with the same data"
            )
        place = self._places[key]
        assert place[3] - place[2] == count, "a key covers the number of supervised tokens"
        return place

    def _sparse(self, name: str, number: int, start: int, stop: int) -> SparseTarget:
        shard = self._shard(name)
        columns = {column: shard.get_slice(column)[start:stop] for column in PER_TOKEN}
        for column, starts in (("masses", "mass_starts"), ("ids", "id_starts")):
            first, last = shard.get_slice(starts)[number : number + 2].tolist()
            columns[column] = shard.get_slice(column)[first:last]
        arrays = {column: tensor.numpy() for column, tensor in columns.items()}
        return decode_sparse(
            arrays, threshold=self.manifest["threshold"], vocabulary_rows=len(self.head)
        )

    def _states(self, name: str, number: int, start: int, stop: int) -> Tensor:
        shard = self._shard(name)
        hidden: Tensor = shard.get_slice("hidden")[start:stop]
        if hidden.dtype == torch.int8:
            assert self.rotation is not None
            hidden = dequantize(hidden, shard.get_slice("scales")[start:stop], self.rotation)
        return hidden.to(self.dtype)

    def _shard(self, name: str) -> Any:
        """Return an open, memory-mapped shard, whose checksum is verified once."""
        if name not in self._open:
            if checksum(self.folder.shard(name)) != self.manifest["shards"][name]["sha256"]:
                raise damaged_shard(self.folder.shard(name), "its checksum differs")
            self._open[name] = open_shard(self.folder, name, self.manifest)
        return self._open[name]

    def _head_on(self, device: torch.device) -> Head:
        if device not in self._heads:
            self._heads[device] = self.head.to(device)
        return self._heads[device]


def rotation(size: int) -> Tensor:
    """Return a random orthogonal matrix ``[H, H]``.

    Hidden states have a few large components, which make the steps of int8 too coarse for the
    others. Rotated states have none: on the demo the cost of rounding falls from 0.0028 nats to
    0.0003. The matrix is stored with the capture, as other machines would compute another one.
    """
    random = torch.Generator().manual_seed(0)
    orthogonal: Tensor = torch.linalg.qr(torch.randn(size, size, generator=random)).Q
    return orthogonal.contiguous()


def quantize(hidden: Tensor, rotated_by: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 rows and their factors: ``[N, H]`` → ``[N, H]``, ``[N, 1]`` in float32."""
    wide = hidden.float() @ rotated_by
    scales = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (wide / scales).round().to(torch.int8), scales


def dequantize(rows: Tensor, scales: Tensor, rotated_by: Tensor) -> Tensor:
    """Return what `quantize` was given, up to rounding, in float32."""
    return (rows.float() * scales) @ rotated_by.T


def open_shard(folder: CaptureFolder, name: str, manifest: dict[str, Any]) -> Any:
    """Return a shard, memory-mapped. Raises: ModelError if it is missing or cut short."""
    path = folder.shard(name)
    try:
        if path.stat().st_size != manifest["shards"][name]["bytes"]:
            raise damaged_shard(path, "its size differs")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise damaged_shard(path, "missing or unreadable") from error


def damaged_shard(path: Path, reason: str) -> ModelError:
    """Return the error for a shard that cannot be used."""
    return ModelError(
        f"{path}: damaged ({reason}); run the same potstill capture again, which replaces it"
    )


def read_head(folder: CaptureFolder, manifest: dict[str, Any]) -> tuple[Head, Tensor | None]:
    """Return the teacher's head, and the rotation of ``states8``.

    Raises: ModelError if the file is missing or damaged.
    """
    again = "run potstill capture again in a new folder"
    head, tensors = stored_head.read_head(folder.path, manifest["head"], again=again)
    return head, tensors.get("rotation")


def open_captured(source: str, opener: ModelOpener) -> CapturedTeacher:
    """Open a capture folder as a teacher."""
    return CapturedTeacher(
        Path(source).expanduser(), tokenizer=open_captured_tokenizer(source, opener)
    )


def open_captured_tokenizer(source: str, opener: ModelOpener) -> Tokenizer:
    """Open the tokenizer that is kept with a capture, with the date of its chat template."""
    opener = dataclasses.replace(opener, template_date=captured_date(source))
    return opener.tokenizer(CaptureFolder(Path(source).expanduser()).tokenizer)


def captured_date(source: str) -> str | None:
    """Return the date that the template wrote into a capture; None for another source."""
    if not is_capture(source):
        return None
    date: str | None = CaptureFolder(Path(source).expanduser()).read_manifest().get("template_date")
    return date
