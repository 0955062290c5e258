"""Capture a teacher: store its hidden states at the supervised tokens of conversations.

The conversations are read once, and those that the folder does not have yet are gathered into
shards of `SHARD_CONVERSATIONS`. A shard is written whole or not at all, and its bytes depend on its
conversations alone: after a kill, the same command continues and ends with the same files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.alignment import token_bytes
from potstill.data import TokenCounts, encode_conversation
from potstill.data.pairs import with_sampled_ids
from potstill.errors import ConfigError, RunFolderError
from potstill.models import ModelOpener
from potstill.models.chat_template import kept_date
from potstill.protocols import Tokenizer
from potstill.shards import lock_folder
from potstill.teachers.capture_writer import CaptureWriter
from potstill.teachers.captured import (
    KEEPS,
    CaptureFolder,
    captured_date,
    is_capture,
    row_key,
)

SHARD_CONVERSATIONS = 256
THRESHOLD = 0.025
ENGINES = ("local", "ray")


@dataclass
class CaptureCounts(TokenCounts):
    """Count what was read, and what the folder had already."""

    captured: int = 0
    """Conversations that this call captured."""
    present: int = 0
    """Conversations that were captured before, or occur twice in the data."""

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.captured} captured now, {self.present} before"


def capture_conversations(
    teacher: str,
    conversations: Iterable[dict[str, Any]],
    output_dir: str | Path,
    *,
    keep: str = "states",
    threshold: float = THRESHOLD,
    max_length: int,
    opener: ModelOpener | None = None,
    engine: str = "local",
    workers: int = 2,
    progress: bool = True,
) -> CaptureCounts:
    """Store what ``teacher`` knows about ``conversations`` that the folder does not have yet.

    ``keep``: ``states`` are the inputs of the LM head in the teacher's dtype; ``states8`` are the
    same in 8 bits; ``sparse`` are a few tokens of each distribution, those of at least
    ``threshold`` and a sample of the others (losses/sparse.py). Conversations are cut at
    ``max_length`` tokens. The model is only opened if there is something to capture. With
    ``engine`` ray, ``workers`` actors on the machines of a Ray cluster compute the shards.

    Raises: ConfigError; RunFolderError if the folder holds something else; ModelError for a head
    that cannot be stored or states that are not finite.
    """
    _check(keep, threshold, engine, workers)
    folder = CaptureFolder(Path(output_dir).expanduser())
    opener = _with_date(opener or ModelOpener(), folder)
    tokenizer = opener.tokenizer(teacher)
    made_with = _made_with(teacher, tokenizer, opener, keep, threshold, max_length)
    _refuse_other(folder, made_with, opener)
    writer = CaptureWriter(folder, made_with, keep, opener, tokenizer, progress)
    folder.path.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder.path / ".lock"):
        writer.read_present()
        counts = CaptureCounts()
        shards = _missing_in_shards(conversations, tokenizer, max_length, writer, counts)
        if engine == "ray":
            writer.write_with_ray(shards, workers=workers)
        else:
            for shard in shards:
                writer.write(shard)
        writer.finish()
    return counts


def _made_with(
    teacher: str,
    tokenizer: Tokenizer,
    opener: ModelOpener,
    keep: str,
    threshold: float,
    max_length: int,
) -> dict[str, Any]:
    """Return the settings that must be the same in a later call."""
    made_with: dict[str, Any] = {
        "teacher": str(teacher),
        "keep": keep,
        "max_length": max_length,
        **template_hashes(tokenizer),
        "template_date": opener.template_date,
        "quantize_teacher": opener.quantize,
    }
    if keep == "sparse":
        made_with["threshold"] = threshold
    return made_with


def _check(keep: str, threshold: float, engine: str, workers: int) -> None:
    """Raises: ConfigError."""
    if keep not in KEEPS:
        raise ConfigError(f"--keep {keep}: must be one of {', '.join(KEEPS)}")
    if not 1e-3 <= threshold < 0.5:
        raise ConfigError(f"--threshold {threshold}: must be at least 0.001 and below 0.5")
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: must be one of {', '.join(ENGINES)}")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")


def _with_date(opener: ModelOpener, folder: CaptureFolder) -> ModelOpener:
    """Return the opener with the date that the chat template writes into this capture."""
    date = kept_date(opener.template_date, captured_date(str(folder.path)))
    return dataclasses.replace(opener, template_date=date)


def _missing_in_shards(
    conversations: Iterable[dict[str, Any]],
    tokenizer: Tokenizer,
    max_length: int,
    writer: CaptureWriter,
    counts: CaptureCounts,
) -> Iterator[list[dict[str, Any]]]:
    shard: list[dict[str, Any]] = []
    tokens: list[bytes | None] = []
    for conversation in conversations:
        row = encode_conversation(conversation, tokenizer, max_length=max_length)
        if not counts.add(row):
            continue
        readings = [row]
        if conversation.get("teacher_ids"):  # `cross` reads what the teacher sampled
            tokens = tokens or token_bytes(tokenizer)
            readings.append(_as_sampled(conversation, tokenizer, tokens, max_length))
        missing = {row_key(one)[0]: one for one in readings}
        missing = {key: one for key, one in missing.items() if key not in writer.present}
        counts.captured += bool(missing)
        counts.present += not missing
        writer.present |= missing.keys()
        shard += missing.values()
        if len(shard) >= SHARD_CONVERSATIONS:
            yield shard
            shard = []
    if shard:
        yield shard


def _as_sampled(
    conversation: dict[str, Any],
    tokenizer: Tokenizer,
    tokens: Sequence[bytes | None],
    max_length: int,
) -> dict[str, Any]:
    row = encode_conversation(conversation, tokenizer)
    row = with_sampled_ids(row, conversation["teacher_ids"], tokens)
    return {name: row[name][:max_length] for name in ("input_ids", "labels")}


def _refuse_other(folder: CaptureFolder, made_with: dict[str, Any], opener: ModelOpener) -> None:
    if folder.path.is_file():
        raise RunFolderError(f"{folder.path}: a file; give a folder as --output-dir")
    if not folder.manifest_file.is_file():
        found = {path.name for path in folder.path.iterdir()} if folder.path.is_dir() else set()
        if found - {".lock", "shards", "tokenizer", ".tokenizer.unfinished", "head.safetensors"}:
            raise RunFolderError(
                f"{folder.path}: not empty, and not a capture; give another --output-dir"
            )
        return
    if not is_capture(str(folder.path)):
        raise RunFolderError(f"{folder.path}: not a capture; give another --output-dir")
    manifest = folder.read_manifest()
    if opener.dtype not in ("auto", manifest["dtype"]):
        raise RunFolderError(
            f"{folder.path}: captured in {manifest['dtype']}, not {opener.dtype}; give the same "
            "--precision, or another --output-dir"
        )
    for name, value in made_with.items():
        if manifest.get(name) != value:
            raise RunFolderError(
                f"{folder.path}: captured with {name} {manifest.get(name)}, not {value}; "
                "give another --output-dir"
            )


def template_hashes(tokenizer: Tokenizer) -> dict[str, str]:
    """Return hashes of the vocabulary and of the chat template."""
    return {
        "tokenizer": _text_hash(json.dumps(tokenizer.get_vocab(), sort_keys=True)),
        "chat_template": _text_hash(str(tokenizer.chat_template)),
    }


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
