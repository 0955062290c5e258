"""Keep a round of rollouts on disk, so that a resumed run trains on the same answers.

ROLLOUTS/round-00003-rank-0.safetensors: the encoded answers as JSON in its metadata, and the
teacher's hidden states of all answers, ``[N, H]``, in their order.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from potstill.data.batches import Encoded
from potstill.errors import RunFolderError


@dataclass(frozen=True)
class RolloutFiles:
    """The files of one process, in ``folder``."""

    folder: Path
    rank: int = 0

    def path(self, number: int) -> Path:
        """Return the file of a round."""
        return self.folder / f"round-{number:05d}-rank-{self.rank}.safetensors"

    def write(self, number: int, rows: list[Encoded], states: list[Tensor]) -> None:
        """Write a round, whole or not at all; ``states`` has one tensor ``[n, H]`` per row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(number)
        unfinished = path.with_name(f".{path.name}.unfinished")
        sizes = [len(part) for part in states]
        about = {"rows": json.dumps(rows), "sizes": json.dumps(sizes)}
        save_file({"hidden": torch.cat(states)}, unfinished, metadata=about)
        os.replace(unfinished, path)

    def read(self, number: int) -> tuple[list[Encoded], list[Tensor]]:
        """Return what `write` was given. Raises: RunFolderError if it is missing or damaged."""
        path = self.path(number)
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = file.metadata()
                hidden = file.get_tensor("hidden")
            rows, sizes = json.loads(about["rows"]), json.loads(about["sizes"])
            return rows, list(hidden.split(sizes))
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise RunFolderError(
                f"{path}: missing or damaged, and the student that wrote these answers is gone; "
                "delete the newest checkpoint to go on from the one before, or run again in "
                "another folder"
            ) from error

    def delete_before(self, number: int) -> None:
        """Delete earlier rounds of this process."""
        for path in self.folder.glob(f"round-*-rank-{self.rank}.safetensors"):
            found = re.match(r"round-(\d+)-", path.name)
            if found and int(found[1]) < number:
                path.unlink()
