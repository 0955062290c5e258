"""From a file, or anything `datasets` opens, to conversations.

Three forms of row are read, and all become one of two:

    {"messages": [{"role", "content"}, …]}    →  the same
    {"prompt": …, "completion": …}            →  {"messages": [user, assistant]}
    {"text": …}                               →  the same: plain text, every token of it to be learned

A row may say ``"cut_off": true``: its last answer was stopped by a length limit, so its end is not the teacher's and is not
learned; ``"teacher_ids"``: the ids that were sampled for it; ``"sampling"``: how (potstill.generation); and ``"reference"``: an
answer that is not the teacher's, to compare with. Prompts alone are ``{"prompt": …}`` or ``{"messages": …}`` that end with a
user's turn. Other keys are left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from potstill.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
Conversation = dict[str, Any]


def read_conversations(source: str | os.PathLike[str], *, split: str = "train", streaming: bool = False) -> Iterator[Conversation]:
    """Conversations from a ``.jsonl`` file, from another file or folder `datasets` opens, or from a hub data set, one by one.

    ``streaming`` reads a `datasets` source without downloading it whole. Raises: DataError for a missing or unreadable source,
    or for a row in none of the three forms, named by its file and line.
    """
    for place, row in _rows(source, split, streaming):
        yield as_conversation(row, place)


def read_prompts(source: str | os.PathLike[str]) -> Iterator[Conversation]:
    """Conversations that end with a user's turn, as ``{"messages": …}`` and whatever else the row says.

    A row with an answer loses it: ``completion``, or the assistant's last turn. Raises: DataError as `read_conversations`.
    """
    for place, row in _rows(source, "train", False):
        if "messages" not in row and isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        else:
            messages = without_answer(_checked_messages(row.get("messages"), place))
        if not messages:
            raise DataError(f'{place}: no prompt there; a prompt is {{"prompt": …}} or messages that end with a user turn')
        yield {**row, "messages": messages}


def without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages up to the last turn that is not the assistant's."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def with_reference(conversation: Conversation) -> Conversation:
    """The conversation with its ``reference`` for an answer, in place of what the teacher wrote after the last question."""
    turn = {"role": "assistant", "content": conversation["reference"]}
    return {"messages": [*without_answer(conversation["messages"]), turn]}


def _rows(source: str | os.PathLike[str], split: str, streaming: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the place it stands, for error messages."""
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".ndjson"):
        return json_lines(path)
    return ((f"{source}, row {number}", row) for number, row in enumerate(_open_dataset(source, split, streaming), 1))


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with the place each stands at, ``FILE:LINE``. Raises: DataError for what is none."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno}); each line holds one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON {type(row).__name__}; each line holds one JSON object")
    return row


def _open_dataset(source: str | os.PathLike[str], split: str, streaming: bool) -> Iterable[dict[str, Any]]:
    import datasets

    builders = {".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
    path = Path(source).expanduser()
    if path.suffix in builders and not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    try:
        if path.suffix in builders:
            opened = datasets.load_dataset(builders[path.suffix], data_files=str(path), split="train", streaming=streaming)
        elif (path / "state.json").is_file():
            opened = datasets.load_from_disk(str(path))
        else:
            opened = datasets.load_dataset(str(source), split=split, streaming=streaming)
    except Exception as error:  # datasets raises what its many readers raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: cannot be opened as data ({reason}); give a .jsonl file or a data set's name") from error
    return opened  # type: ignore[no-any-return]


def as_conversation(row: dict[str, Any], place: str) -> Conversation:
    """A row in any of the three forms as a conversation. Raises: DataError that names its ``place``."""
    kept = {name: row[name] for name in ("cut_off", "teacher_ids", "sampling", "reference") if row.get(name)}
    if not isinstance(kept.get("reference", ""), str):
        raise DataError(f"{place}: reference must be an answer as text")
    if row.get("messages") is not None:
        messages = _checked_messages(row["messages"], place)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{place}: no assistant turn to learn from; let the teacher answer first (potstill generate)")
        return {"messages": messages, **kept}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        turns = [("user", row["prompt"]), ("assistant", row["completion"])]
        return {"messages": [{"role": role, "content": content} for role, content in turns], **kept}
    if isinstance(row.get("text"), str):
        return {"text": row["text"], **kept}
    hint = "; let the teacher answer first (potstill generate)" if "prompt" in row else ""
    raise DataError(f"{place}: has {', '.join(sorted(row)) or 'no keys'}; needs messages, prompt and completion, or text{hint}")


def _checked_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{place}: messages must be a list of {{"role", "content"}} that is not empty')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(f"{place}: message {number} needs a role ({', '.join(ROLES)}) and its content as text")
    return messages
