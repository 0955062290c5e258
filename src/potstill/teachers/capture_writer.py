"""Write a capture: compute the teacher's hidden states shard by shard (format: captured.py)."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from potstill.errors import ModelError, RunFolderError
from potstill.losses import Head, Projection, forward_kl
from potstill.models import ModelOpener
from potstill.models.heads import output_head
from potstill.processes import print_main
from potstill.progress import Progress
from potstill.protocols import CausalLM, Tokenizer
from potstill.run_folder import write_json
from potstill.shards import checksum
from potstill.teachers.captured import (
    FORMAT,
    CaptureFolder,
    damaged_shard,
    dequantize,
    open_shard,
    quantize,
    read_head,
    rotation,
)
from potstill.teachers.local import LocalTeacher
from potstill.teachers.quantization_cost import ExactStates, measured_cost
from potstill.teachers.ray_shards import ray_or_refuse, ray_shards
from potstill.teachers.shard_maker import ShardMaker
from potstill.teachers.stored_head import store_head, weights_hash

ROUNDING_TOKENS = 4096
"""The cost of rounding to 8 bits is measured on this many tokens."""


@dataclass
class CaptureWriter:
    """Write shards, and the manifest after each."""

    folder: CaptureFolder
    made_with: dict[str, Any]
    keep: str
    opener: ModelOpener
    tokenizer: Tokenizer
    progress: bool
    present: set[bytes] = field(default_factory=set)
    manifest: dict[str, Any] = field(default_factory=dict)
    _teacher: LocalTeacher | None = None
    _turn: Tensor | None = None

    def read_present(self) -> None:
        """Read which conversations are stored; set damaged shards aside."""
        for unfinished in self.folder.path.glob("shards/.*"):
            unfinished.unlink()
        if not self.folder.manifest_file.is_file():
            return
        self.manifest = self.folder.read_manifest()
        for name, known in list(self.manifest["shards"].items()):
            path = self.folder.shard(name)
            try:
                with open_shard(self.folder, name, self.manifest) as shard:
                    keys = shard.get_tensor("keys").numpy()
                if checksum(path) != known["sha256"]:
                    raise damaged_shard(path, "its checksum differs")
            except ModelError:
                print_main(f"{path}: damaged; its conversations are captured again")
                if path.is_file():
                    path.replace(path.with_suffix(".damaged"))
                del self.manifest["shards"][name]
                continue
            self.present |= {key.tobytes() for key in keys}

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Compute and write one shard."""
        exact = self._exact_states(rows)
        teacher = self._open()
        if self.opener.quantize and "quantization_cost" not in self.manifest:
            self.manifest["quantization_cost"] = measured_cost(exact, teacher)
        label = f"capturing shard {len(self.manifest['shards']) + 1}"
        with Progress(label, len(rows), unit="conversations", shown=self.progress) as progress:
            measure = self.keep == "states8" and "rounding_kl_nats" not in self.manifest
            observe = functools.partial(self._measure_rounding, teacher) if measure else None
            tensors = self._maker().make(teacher, rows, observe=observe, progress=progress)
        self._save(tensors)

    def write_with_ray(self, shards: Iterable[list[dict[str, Any]]], *, workers: int) -> None:
        """Write shards that ``workers`` actors compute.

        The first of a new capture is computed here: its measurements are for the manifest.
        """
        ray_or_refuse()
        remaining = iter(shards)
        if not self.manifest.get("shards"):
            first = next(remaining, None)
            if first is None:
                return
            self.write(first)
        self._teacher = None
        for tensors in ray_shards(
            remaining,
            self._maker(),
            self.made_with["teacher"],
            self.opener,
            self.manifest["weights"],
            workers=workers,
        ):
            self._save(tensors)

    def _maker(self) -> ShardMaker:
        turn = self._rotation() if self.keep == "states8" else None
        threshold = self.made_with.get("threshold", 0.0)
        return ShardMaker(self.keep, threshold, self.tokenizer.pad_token_id or 0, turn)

    def _exact_states(self, rows: list[dict[str, Any]]) -> ExactStates | None:
        """Return the states without quantization, if its cost is still to be measured."""
        if self.opener.quantize is None or "quantization_cost" in self.manifest:
            return None
        return ExactStates.collect(self.made_with["teacher"], self.opener, rows)

    def _open(self) -> LocalTeacher:
        """Open the teacher; store its head and tokenizer if the folder is new."""
        if self._teacher is not None:
            return self._teacher
        model = self.opener.model(self.made_with["teacher"])
        if self.manifest:
            if self.manifest["weights"] != weights_hash(model):
                raise RunFolderError(
                    f"{self.folder.path}: captured from other weights of this teacher (in "
                    f"{self.manifest['dtype']}); give the same --precision or another --output-dir"
                )
        else:
            self._begin(model)
        self._teacher = LocalTeacher(model)
        return self._teacher

    def _begin(self, model: CausalLM) -> None:
        (self.folder.path / "shards").mkdir(exist_ok=True)
        head, turn = output_head(model), {}
        if self.keep == "states8" and isinstance(head, Head):
            turn = {"rotation": rotation(head.weight.shape[1])}
        name = self.made_with["teacher"]
        stored = store_head(self.folder.path, model, self.tokenizer, name, **turn)
        self.manifest = {"kind": "capture", "format": FORMAT, **self.made_with, **stored}
        self.manifest["shards"] = {}
        write_json(self.folder.manifest_file, self.manifest)

    def _rotation(self) -> Tensor:
        if self._turn is None:
            _, self._turn = read_head(self.folder, self.manifest)
        assert self._turn is not None, "written with the head"
        return self._turn

    def _measure_rounding(self, teacher: LocalTeacher, states: Tensor) -> None:
        if "rounding_kl_nats" in self.manifest:
            return
        exact = states[:ROUNDING_TOKENS]
        turn = self._rotation().to(exact.device)
        rounded = dequantize(*quantize(exact, turn), turn).to(exact.dtype)
        head = output_head(teacher.model)
        device = teacher.model.device
        other = Projection(rounded.to(device), head)
        nats = [
            forward_kl(logits, other.logits(positions)).double().sum()
            for positions, logits in Projection(exact.to(device), head).blocks()
        ]
        self.manifest["rounding_kl_nats"] = float(sum(nats)) / len(exact)

    def _save(self, tensors: dict[str, Tensor]) -> None:
        name = f"{hashlib.sha256(tensors['keys'].numpy().tobytes()).hexdigest()[:16]}.safetensors"
        path = self.folder.shard(name)
        unfinished = path.with_name(f".{name}.unfinished")
        save_file(tensors, unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        self.manifest["shards"][name] = {
            "conversations": len(tensors["keys"]),
            "tokens": int(tensors["starts"][-1]),
            "bytes": path.stat().st_size,
            "sha256": checksum(path),
        }
        write_json(self.folder.manifest_file, self.manifest)

    def finish(self) -> None:
        """Write the totals."""
        if not self.manifest:
            return
        shards = self.manifest["shards"].values()
        for name in ("conversations", "tokens", "bytes"):
            self.manifest[name] = sum(shard[name] for shard in shards)
        write_json(self.folder.manifest_file, self.manifest)
