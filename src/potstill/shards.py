"""Store JSON rows by key in files that survive a kill; used for answers.

FOLDER/manifest.json         what the rows were made with; row count and checksum of sealed shards
FOLDER/SUBFOLDER/00000.jsonl a shard: one row per line, in the order of writing

Only the newest shard is written to, and only at its end. Rows that were made together are one unit:
each line has `more`, the number of lines of its unit that follow, and an incomplete unit at the end
is cut off when the folder is opened again. A full shard is sealed: its checksum is written to the
manifest. A sealed shard with another checksum is renamed, and its rows count as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from potstill.errors import RunFolderError
from potstill.run_folder import write_json

Row = dict[str, Any]
"""A JSON object with a string `key` and without the name `more`."""

SHARD_ROWS = 4096
_OFFSET_BITS = 40


def made_with_at(folder: Path) -> dict[str, Any]:
    """Return the settings with which the shards in a folder were made; empty if there are none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return dict(manifest["made_with"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class ShardStore:
    """Store rows in `folder`, which need not exist yet. Use it in a `with` block.

    `made_with` holds every setting that decides the rows.
    Raises: RunFolderError if the rows of the folder were made with other settings, if it holds
    other files, or, on entering, if another process writes to it.
    """

    def __init__(
        self,
        folder: Path,
        made_with: dict[str, Any],
        *,
        subfolder: str,
        shard_rows: int = SHARD_ROWS,
    ) -> None:
        self.folder, self.shard_rows = folder, shard_rows
        self.manifest_file, self.shards = folder / "manifest.json", folder / subfolder
        self.manifest = self._read_manifest(made_with)
        self.damaged: list[str] = []
        # shard number << 40 | byte offset: one integer per key keeps a million keys in 250 MB
        self._positions: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.shards.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder / ".lock")
        if not self.manifest_file.is_file():
            self._write_manifest()
        for path in sorted(self.shards.glob("*.jsonl")):
            self._open_shard(path)
        for name in list(self.manifest["shards"]):
            if not (self.shards / name).is_file():
                self._set_aside(self.shards / name)
        numbers = [int(path.stem) for path in self.shards.glob("*.jsonl")]
        unsealed = [n for n in numbers if _shard_name(n) not in self.manifest["shards"]]
        self._start_shard(max(unsealed, default=max(numbers, default=-1) + 1))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # flushes again what a full disk refused, so it may fail
        finally:
            self._lock.close()

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def __len__(self) -> int:
        return len(self._positions)

    def append(self, unit: Sequence[Row]) -> None:
        """Write the rows of one unit. After a kill, all of them are there or none."""
        lines = [
            (json.dumps({**row, "more": more}, ensure_ascii=False) + "\n").encode()
            for row, more in zip(unit, reversed(range(len(unit))), strict=True)
        ]
        self._file.write(b"".join(lines))
        self._file.flush()
        for row, line in zip(unit, lines, strict=True):
            self._positions[row["key"]] = self._number << _OFFSET_BITS | self._offset
            self._offset += len(line)
        self._rows += len(unit)
        if self._rows >= self.shard_rows:
            self.seal()

    def seal(self) -> None:
        """Close the newest shard, write its checksum to the manifest, and start the next one."""
        if not self._rows:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        name = _shard_name(self._number)
        sealed = {"rows": self._rows, "sha256": checksum(self.shards / name)}
        self.manifest["shards"][name] = sealed
        self._write_manifest()
        self._start_shard(self._number + 1)

    def read(self, keys: Iterable[str]) -> Iterator[Row]:
        """Yield the rows of `keys`, in their order; skip keys without a row."""
        positions = (self._positions[key] for key in keys if key in self._positions)
        for number, in_shard in itertools.groupby(positions, lambda place: place >> _OFFSET_BITS):
            with (self.shards / _shard_name(number)).open("rb") as file:
                for position in in_shard:
                    file.seek(position & ((1 << _OFFSET_BITS) - 1))
                    row: Row = json.loads(file.readline())
                    del row["more"]
                    yield row

    def note(self, **facts: Any) -> None:
        """Write `facts` about the rows to the manifest."""
        self.manifest |= facts
        self._write_manifest()

    def _read_manifest(self, made_with: dict[str, Any]) -> dict[str, Any]:
        if not self.manifest_file.is_file():
            # A kill can leave these before there is a manifest.
            expected = {".lock", self.shards.name, ".manifest.json.unfinished"}
            found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
            if found - expected or self.folder.is_file():
                raise RunFolderError(
                    f"{self.folder}: not empty, and not from potstill; give another --output-dir"
                )
            return {"made_with": made_with, "shards": {}}
        try:
            manifest: dict[str, Any] = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            earlier = manifest["made_with"]
        except (ValueError, KeyError, TypeError) as error:
            message = f"{self.manifest_file}: damaged; give another --output-dir"
            raise RunFolderError(message) from error
        for name, value in made_with.items():
            if earlier.get(name) != value:
                raise RunFolderError(
                    f"{self.folder}: made with {name} {earlier.get(name)}, not {value}; "
                    "give another --output-dir"
                )
        return manifest

    def _write_manifest(self) -> None:
        write_json(self.manifest_file, self.manifest)

    def _open_shard(self, path: Path) -> None:
        sealed = self.manifest["shards"].get(path.name)
        if sealed and checksum(path) != sealed["sha256"]:
            self._set_aside(path)
            return
        offsets, end = _complete_units(path)
        if not sealed and end < path.stat().st_size:
            os.truncate(path, end)
        number = int(path.stem) << _OFFSET_BITS
        self._positions |= {key: number | offset for key, offset in offsets.items()}

    def _set_aside(self, path: Path) -> None:
        self.damaged.append(str(path))
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, path.with_suffix(".damaged"))
        del self.manifest["shards"][path.name]
        self._write_manifest()

    def _start_shard(self, number: int) -> None:
        path = self.shards / _shard_name(number)
        self._number, self._file = number, path.open("ab")
        self._offset = path.stat().st_size
        self._rows = sum(place >> _OFFSET_BITS == number for place in self._positions.values())


def _complete_units(path: Path) -> tuple[dict[str, int], int]:
    """Return the byte offset of each row in a complete unit, and the end of the last such unit."""
    offsets: dict[str, int] = {}
    unit: dict[str, int] = {}
    offset = end = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                row: Any = json.loads(line) if line.endswith(b"\n") else None
                unit[row["key"]] = offset
                is_last = row["more"] == 0
            except (ValueError, KeyError, TypeError):  # an incomplete line: ignore all that follows
                break
            offset += len(line)
            if is_last:
                offsets |= unit
                unit, end = {}, offset
    return offsets, end


def _shard_name(number: int) -> str:
    return f"{number:05}.jsonl"


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_folder(path: Path) -> IO[str]:
    """Lock the file at `path` until it is closed. Raises: RunFolderError if it is locked."""
    file = path.open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no fcntl and no lock here
        pass
    except OSError as error:
        file.close()
        message = f"{path.parent}: another process writes there; wait for it, or stop it"
        raise RunFolderError(message) from error
    return file
