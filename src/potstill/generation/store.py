"""Store answers in the shards FOLDER/answers/00000.jsonl, … (potstill.shards)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.generation.engine import Answer
from potstill.shards import SHARD_ROWS, ShardStore


class AnswerStore(ShardStore):
    """Store answers by key in `folder`; see `ShardStore` for the rest."""

    def __init__(
        self, folder: Path, made_with: dict[str, Any], *, shard_rows: int = SHARD_ROWS
    ) -> None:
        super().__init__(folder, made_with, subfolder="answers", shard_rows=shard_rows)

    def add(self, unit: Sequence[Answer]) -> None:
        """Write the answers of one unit. After a kill, all of them are there or none."""
        self.append([answer.as_row() for answer in unit])


def data_made_with(file: str | Path) -> dict[str, Any]:
    """Return what made the data set of ``file``; empty if `potstill generate` did not make it."""
    manifest = Path(file).expanduser().parent / "manifest.json"
    try:
        made_with = json.loads(manifest.read_bytes())["made_with"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return made_with if isinstance(made_with, dict) else {}


def parse_answer(row: dict[str, Any]) -> Answer:
    """Return the answer that was stored as `row`."""
    return Answer(**row)
