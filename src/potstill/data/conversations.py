"""Read conversations from a file, or from anything that `datasets` opens.

Three forms of row are read, and all become one of two:

    {"messages": [{"role", "content"}, …]}    →  the same
    {"prompt": …, "completion": …}            →  {"messages": [user, assistant]}
    {"text": …}                               →  the same: plain text, all of it supervised

Optional keys are ``"cut_off"`` (a length limit stopped the last answer, so its end is not learned),
``"teacher_ids"`` (the ids sampled for it), ``"sampling"`` (how) and ``"reference"`` (an answer that
is not the teacher's, to compare with). Prompts are ``{"prompt"}``, or ``{"messages"}`` that end
with a user's turn. Other keys are left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from potstill.data.messages import checked_messages
from potstill.errors import DataError
from potstill.models.files import POINTER_FOUND, is_lfs_pointer

BUILDERS = {
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
ANSWER_FIRST = "let the teacher answer first (potstill generate)"
Conversation = dict[str, Any]
Source = str | os.PathLike[str]


def read_conversations(
    source: Source, *, split: str = "train", streaming: bool = False
) -> Iterator[Conversation]:
    """Yield the conversations of a ``.jsonl`` file, another file or folder, or a hub data set.

    ``streaming`` does not download a `datasets` source whole. Raises: DataError for a missing or
    unreadable source, or with file and line for a row in none of the three forms.
    """
    for place, row in _rows(source, split, streaming):
        yield as_conversation(row, place)


def read_prompts(source: Source) -> Iterator[Conversation]:
    """Yield rows as ``{"messages": …}`` that end with a user's turn; other keys are kept.

    An answer (``completion``, or the last assistant turn) is dropped. Raises: DataError.
    """
    for place, row in _rows(source, "train", False):
        if "messages" not in row and isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        else:
            messages = without_answer(checked_messages(row.get("messages"), place))
        if not messages:
            expected = '{"prompt": …} or messages that end with a user turn'
            raise DataError(f"{place}: no prompt there; a prompt is {expected}")
        yield {**row, "messages": messages}


def without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages up to the last turn that is not the assistant's."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def with_reference(conversation: Conversation) -> Conversation:
    """Return the conversation with its ``reference`` in place of the teacher's last answer."""
    turn = {"role": "assistant", "content": conversation["reference"]}
    return {"messages": [*without_answer(conversation["messages"]), turn]}


def _rows(source: Source, split: str, streaming: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place, for error messages."""
    path = Path(source).expanduser()
    if path.is_file() and os.access(path, os.R_OK) and is_lfs_pointer(path):
        raise DataError(f"{path}: {POINTER_FOUND}")
    if path.suffix in (".jsonl", ".ndjson"):
        return json_lines(path)
    rows = enumerate(_open_dataset(source, split, streaming), 1)
    return ((f"{source}, row {number}", row) for number, row in rows)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file, each with its place ``FILE:LINE``. Raises: DataError."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        found = f"not UTF-8 ({error.reason} at byte {error.start})"
        raise DataError(f"{path}: {found}; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    need = "each line holds one JSON object"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno}); {need}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON {type(row).__name__}; {need}")
    return row


def _open_dataset(source: Source, split: str, streaming: bool) -> Iterable[dict[str, Any]]:
    import datasets

    path = Path(source).expanduser()
    builder = BUILDERS.get(path.suffix)
    if builder and not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    opened: Iterable[dict[str, Any]]
    try:
        if builder:
            opened = datasets.load_dataset(
                builder, data_files=str(path), split="train", streaming=streaming
            )
        elif (path / "state.json").is_file():
            opened = datasets.load_from_disk(str(path))
        else:
            opened = datasets.load_dataset(str(source), split=split, streaming=streaming)
    except Exception as error:  # its readers raise many kinds
        reason = f"cannot be opened as data ({' '.join(str(error).split())[:200]})"
        raise DataError(f"{source}: {reason}; give a .jsonl file or a data set's name") from error
    return opened


def as_conversation(row: dict[str, Any], place: str) -> Conversation:
    """Return a row in any of the three forms as a conversation. Raises: DataError."""
    optional = ("cut_off", "teacher_ids", "sampling", "reference")
    kept = {name: row[name] for name in optional if row.get(name)}
    if not isinstance(kept.get("reference", ""), str):
        raise DataError(f"{place}: reference must be an answer as text")
    if row.get("messages") is not None:
        messages = checked_messages(row["messages"], place)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{place}: no assistant turn to learn from; {ANSWER_FIRST}")
        return {"messages": messages, **kept}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        turns = [("user", row["prompt"]), ("assistant", row["completion"])]
        return {"messages": [{"role": role, "content": text} for role, text in turns], **kept}
    if isinstance(row.get("text"), str):
        return {"text": row["text"], **kept}
    found = ", ".join(sorted(row)) or "no keys"
    hint = f"; {ANSWER_FIRST}" if "prompt" in row else ""
    raise DataError(f"{place}: has {found}; needs messages, prompt and completion, or text{hint}")
