"""Answers on the disk: written as they come, none lost, none twice, whenever the process dies.

FOLDER/manifest.json         with what the answers were made, and for each sealed shard its rows and its checksum
FOLDER/answers/00000.jsonl   a shard: answers in the order they came, one a line

Only the newest shard is written to, and only at its end. Answers that were made together are written together: each row says how
many of its unit follow (``more``), and whatever stands behind the last complete unit is cut away when the folder is opened again. A
full shard is sealed: its checksum goes into the manifest, and one that no longer has it is named, put aside, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.errors import RunFolderError
from potstill.generation.engine import Answer
from potstill.run_folder import write_json

SHARD_ROWS = 4096
_OFFSET_BITS = 40
_BEGINNINGS = {".lock", "answers", ".manifest.json.unfinished"}  # what a kill can leave before there is a manifest


class AnswerStore:
    """The answers in ``folder``, which need not exist yet. Use it in a ``with``: one process at a time.

    ``made_with`` names everything that decides the answers. Raises: RunFolderError if the folder's answers were made with something
    else (it says what), if it holds something that is no data set of ours, or if another process is writing to it.
    """

    def __init__(self, folder: Path, made_with: dict[str, Any], *, shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.shard_rows = folder, shard_rows
        self.manifest_file, self.shards = folder / "manifest.json", folder / "answers"
        self.manifest = self._read_manifest(made_with)
        self.damaged: list[str] = []
        self._place: dict[str, int] = {}  # key → shard << 40 | offset: a million keys in a quarter of a gigabyte

    def __enter__(self) -> AnswerStore:
        self.shards.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / ".lock")
        if not self.manifest_file.is_file():
            self._write_manifest()
        for path in sorted(self.shards.glob("*.jsonl")):
            self._open_shard(path)
        gone = [name for name in self.manifest["shards"] if not (self.shards / name).is_file()]
        for name in gone:
            self._set_aside(self.shards / name)
        numbers = [int(path.stem) for path in self.shards.glob("*.jsonl")]
        unsealed = [number for number in numbers if _name(number) not in self.manifest["shards"]]
        self._start_shard(max(unsealed, default=max(numbers, default=-1) + 1))
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._out.close()  # which writes, where the disk was full, what could not be written
        finally:
            self._lock.close()

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def add(self, unit: Sequence[Answer]) -> None:
        """Keep the answers of a unit: all of them, or after a kill none."""
        lines = [
            (json.dumps({**answer.as_row(), "more": len(unit) - 1 - i}, ensure_ascii=False) + "\n").encode()
            for i, answer in enumerate(unit)
        ]
        self._out.write(b"".join(lines))
        self._out.flush()
        for answer, line in zip(unit, lines, strict=True):
            self._place[answer.key] = self._number << _OFFSET_BITS | self._offset
            self._offset += len(line)
        self._rows += len(unit)
        if self._rows >= self.shard_rows:
            self.seal()

    def seal(self) -> None:
        """Close the newest shard, write its checksum down, and begin another."""
        if not self._rows:
            return
        os.fsync(self._out.fileno())
        self._out.close()
        name = _name(self._number)
        self.manifest["shards"][name] = {"rows": self._rows, "sha256": _checksum(self.shards / name)}
        self._write_manifest()
        self._start_shard(self._number + 1)

    def read(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """The answers to ``keys``, in their order; those that are not there are left out."""
        number, file = -1, None
        try:
            for key in keys:
                place = self._place.get(key)
                if place is None:
                    continue
                if file is None or place >> _OFFSET_BITS != number:
                    if file is not None:
                        file.close()
                    number = place >> _OFFSET_BITS
                    file = (self.shards / _name(number)).open("rb")
                file.seek(place & ((1 << _OFFSET_BITS) - 1))
                yield json.loads(file.readline())
        finally:
            if file is not None:
                file.close()

    def note(self, **facts: Any) -> None:
        """Write facts about the data set into the manifest."""
        self.manifest |= facts
        self._write_manifest()

    def _read_manifest(self, made_with: dict[str, Any]) -> dict[str, Any]:
        if not self.manifest_file.is_file():
            strangers = self.folder.is_dir() and {path.name for path in self.folder.iterdir()} - _BEGINNINGS
            if strangers or self.folder.is_file():
                raise RunFolderError(f"{self.folder}: not empty, and not a data set of potstill's; give another --output-dir")
            return {"made_with": made_with, "shards": {}}
        try:
            manifest: dict[str, Any] = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            begun = manifest["made_with"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.manifest_file}: damaged; give another --output-dir") from error
        for name, value in made_with.items():
            if begun.get(name) != value:
                raise RunFolderError(
                    f"{self.folder}: its answers were made with {name} {begun.get(name)}, not {value}; give another --output-dir "
                    "for other answers"
                )
        return manifest

    def _write_manifest(self) -> None:
        write_json(self.manifest_file, self.manifest)

    def _open_shard(self, path: Path) -> None:
        sealed = self.manifest["shards"].get(path.name)
        if sealed and _checksum(path) != sealed["sha256"]:
            self._set_aside(path)
            return
        places, end = _whole_units(path)
        if not sealed and end < path.stat().st_size:
            os.truncate(path, end)
        self._place |= {key: int(path.stem) << _OFFSET_BITS | offset for key, offset in places.items()}

    def _set_aside(self, path: Path) -> None:
        self.damaged.append(str(path))
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, path.with_suffix(".damaged"))
        del self.manifest["shards"][path.name]
        self._write_manifest()

    def _start_shard(self, number: int) -> None:
        path = self.shards / _name(number)
        self._number, self._out = number, path.open("ab")
        self._offset = path.stat().st_size
        self._rows = sum(place >> _OFFSET_BITS == number for place in self._place.values())


def parse_answer(row: dict[str, Any]) -> Answer:
    """A line of a shard as the answer it was."""
    return Answer(**{name: value for name, value in row.items() if name != "more"})


def _whole_units(path: Path) -> tuple[dict[str, int], int]:
    """Where each answer of the complete units stands, and where the last of these units ends."""
    places: dict[str, int] = {}
    unit: dict[str, int] = {}
    offset = end = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                row: Any = json.loads(line) if line.endswith(b"\n") else None
                unit[row["key"]] = offset
                last = row["more"] == 0
            except (ValueError, KeyError, TypeError):  # torn here: what follows cannot be trusted
                break
            offset += len(line)
            if last:
                places |= unit
                unit, end = {}, offset
    return places, end


def _name(number: int) -> str:
    return f"{number:05}.jsonl"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locked(path: Path) -> Any:
    """The file at ``path``, locked until it is closed or this process dies. Raises: RunFolderError if another holds it."""
    file = path.open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: two processes in one folder are the user's to avoid
        pass
    except OSError as error:
        file.close()
        raise RunFolderError(f"{path.parent}: another process is writing answers there; wait for it, or stop it") from error
    return file
