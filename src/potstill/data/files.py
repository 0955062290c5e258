"""Read rows from files, folders and data sets of the hub, each with its place for error messages.

JSON is read here, row by row: Arrow would refuse columns of mixed types and add null keys to every
tool call. `datasets` reads everything else.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from potstill.errors import DataError
from potstill.models.files import POINTER_FOUND, is_lfs_pointer

LINES = (".jsonl", ".ndjson")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".arrow": "arrow"}
Source = str | os.PathLike[str]
Placed = tuple[str, dict[str, Any]]


def rows_of(
    source: Source, *, split: str = "train", name: str | None = None, streaming: bool = False
) -> Iterator[Placed]:
    """Yield the rows of a source with their places.

    A source is a file, several files separated by commas, a pattern (``data/*.jsonl``), a folder
    that `datasets` opens, or a hub id, of which ``name`` picks a configuration. Raises: DataError.
    """
    for one in _sources(source):
        path = Path(one).expanduser()
        if path.is_file() and os.access(path, os.R_OK) and is_lfs_pointer(path):
            raise DataError(f"{path}: {POINTER_FOUND}")
        kind = _kind(path)
        if path.is_file() and (split != "train" or name is not None):
            part = f"split {split!r}" if split != "train" else f"configuration {name!r}"
            raise DataError(f"{path}: a file has no {part}; leave it out, or name another file")
        if kind in LINES:
            yield from json_lines(path)
        elif kind == ".json" and path.is_file():
            yield from _json_file(path)
        else:
            rows = _open_dataset(one, split, name, streaming)
            yield from ((f"{one}, row {number}", row) for number, row in enumerate(rows, 1))


def _sources(source: Source) -> list[str]:
    text = str(source)
    if Path(text).expanduser().exists():
        return [text]
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        names = [part]
        if glob.has_magic(part):
            names = sorted(glob.glob(str(Path(part).expanduser()), recursive=True))
            if not names:
                raise DataError(f"{part}: no file has such a name; check the pattern")
        found += names
    return found or [text]


def _kind(path: Path) -> str:
    """Return the lower-case suffix, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def json_lines(path: Path) -> Iterator[Placed]:
    """Yield the objects of a file, each with its place ``FILE:LINE``. Raises: DataError."""
    with _opened(path) as lines:
        for number, line in enumerate(_read(lines, path), 1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line, f"{path}:{number}")


def _json_file(path: Path) -> Iterator[Placed]:
    """Yield the objects of a JSON list; a file that begins otherwise has one object a line."""
    with _opened(path) as file:
        start = next((line for line in _read(file, path) if line.strip()), "")
    try:
        is_lines = isinstance(json.loads(start), dict)
    except ValueError:
        is_lines = False
    if is_lines:
        yield from json_lines(path)
        return
    with _opened(path) as file:
        text = "".join(_read(file, path))
    rows = _loaded(text, str(path), 'a list of objects, as in [{"prompt": …}, …]')
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a list of objects; save one object a line, as .jsonl")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _opened(path: Path) -> IO[str]:
    """Open a text file, decompressed by its suffix, without a byte order mark."""
    compression = _COMPRESSED.get(path.suffix.lower())
    try:
        if compression is None:
            return path.open(encoding="utf-8-sig")
        path.stat()
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression=compression)
        return io.TextIOWrapper(cast(IO[bytes], stream), encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({reason}); check the path") from error


def _read(lines: IO[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        found = f"not UTF-8 ({error.reason} at byte {error.start})"
        raise DataError(f"{path}: {found}; save the file as UTF-8") from error
    except OSError as error:  # a folder, or a compressed file that ends early
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({reason}); check the file") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    need = "each line holds one JSON object"
    row = _loaded(line, place, need)
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON {type(row).__name__}; {need}")
    return row


def _loaded(text: str, place: str, need: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno}); {need}") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: has half of a surrogate pair ({error.object[error.start]!a}), which is "
            "no character; remove it, or write the text again as UTF-8"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: JSON nested too deeply; {need}") from error
    return value


def _open_dataset(
    source: str, split: str, name: str | None, streaming: bool
) -> Iterable[dict[str, Any]]:
    import datasets

    path = Path(source).expanduser()
    builder = _BUILDERS.get(_kind(path))
    if _kind(path) in (*_BUILDERS, ".json") and not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    opened: Any
    try:
        if builder:
            more = {"sep": "\t"} if _kind(path) == ".tsv" else {}
            opened = datasets.load_dataset(
                builder, data_files=str(path), split="train", streaming=streaming, **more
            )
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            opened = datasets.load_from_disk(str(path))
        else:
            opened = datasets.load_dataset(source, name, split=split, streaming=streaming)
        if isinstance(opened, datasets.DatasetDict):
            opened = opened[split]
    except Exception as error:  # its readers raise many kinds
        reason = f"cannot be opened as data ({' '.join(str(error).split())[:200]})"
        hint = "give a .jsonl file or a data set's name (--split and --data-name pick its part)"
        raise DataError(f"{source}: {reason}; {hint}") from error
    return cast(Iterable[dict[str, Any]], opened)
