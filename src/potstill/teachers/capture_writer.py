"""Write a capture: compute the teacher's hidden states shard by shard (format: captured.py)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from potstill.data import IGNORED, BatchLayout
from potstill.errors import ModelError, RunFolderError
from potstill.losses import Head, Projection, forward_kl
from potstill.models import ModelOpener
from potstill.models.heads import on_device, output_head
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
    row_key,
)
from potstill.teachers.local import LocalTeacher
from potstill.teachers.quantization_cost import ExactStates, measured_cost
from potstill.teachers.sparse import encode_sparse
from potstill.teachers.stored_head import store_head, weights_hash

BATCH_TOKENS = 4096
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
        keys: list[bytes] = []
        sizes, parts = [0], []
        label = f"capturing shard {len(self.manifest['shards']) + 1}"
        with Progress(label, len(rows), unit="conversations", shown=self.progress) as progress:
            for batch_rows in _batches(rows):
                found = [row_key(row) for row in batch_rows]
                keys += [key for key, _ in found]
                sizes += [count for _, count in found]
                parts.append(self._encode(teacher, batch_rows, found))
                progress.update(len(batch_rows))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name in ("mass_starts", "id_starts"):
            if name in tensors:
                tensors[name] = torch.cat(
                    [torch.zeros(1, dtype=torch.int64), tensors[name]]
                ).cumsum(0)
        tensors["keys"] = torch.tensor(np.frombuffer(b"".join(keys), dtype=np.uint8)).view(
            len(keys), -1
        )
        tensors["starts"] = torch.tensor(sizes).cumsum(0)
        self._save(tensors)

    def _encode(
        self, teacher: LocalTeacher, rows: list[dict[str, Any]], found: list[tuple[bytes, int]]
    ) -> dict[str, Tensor]:
        """Return what is kept of one batch; ``found`` are keys and numbers of tokens."""
        states, labels = self._states(teacher, rows)
        if not bool(torch.isfinite(states).all()):
            raise ModelError(
                f"{self.made_with['teacher']}: its hidden states are not finite in "
                f"{self.manifest['dtype']}; use --precision bf16 or fp32"
            )
        if self.keep == "states":
            return {"hidden": states.cpu()}
        if self.keep == "states8":
            self._measure_rounding(teacher, states)
            hidden, scales = quantize(states.cpu(), self._rotation())
            return {"hidden": hidden, "scales": scales}
        head, columns = output_head(teacher.model), []
        sizes = [count for _, count in found]
        pairs = zip(torch.split(states, sizes), torch.split(labels, sizes), found, strict=True)
        for part, part_labels, (key, _) in pairs:
            seed = int.from_bytes(key[:8], "little")
            columns.append(
                encode_sparse(
                    part, head, part_labels, threshold=self.made_with["threshold"], seed=seed
                )
            )
        kept = {
            name: torch.from_numpy(np.concatenate([one[name] for one in columns]))
            for name in columns[0]
        }
        for name, column in (("mass_starts", "masses"), ("id_starts", "ids")):
            kept[name] = torch.tensor([len(one[column]) for one in columns])
        return kept

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

    def _states(self, teacher: LocalTeacher, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Return the states ``[N, H]`` and labels ``[N]`` of a batch's supervised tokens."""
        layout = BatchLayout(self.tokenizer.pad_token_id or 0, packed=False)
        batch = on_device(layout(rows), teacher.model.device)
        labels = batch["labels"][:, 1:]
        return teacher.targets(batch).hidden, labels[labels != IGNORED]

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


def _batches(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return batches of conversations of similar length, of at most `BATCH_TOKENS` tokens."""
    batches: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if batches and len(row["input_ids"]) * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
