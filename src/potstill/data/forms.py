"""Turn a row of a data set into a conversation or a prompt, whichever of the usual forms it has.

A column that other trainers use and this library does not is refused by name.
"""

from __future__ import annotations

from typing import Any

from potstill.data.messages import (
    Message,
    checked_messages,
    checked_tools,
    from_sharegpt,
    without_none,
)
from potstill.errors import DataError

ANSWER_FIRST = "let the teacher answer first (potstill generate)"
FORMS = (
    "messages, conversations, instruction and output, prompt and completion, or text "
    "(rename columns with --columns)"
)
FORM_COLUMNS = ("messages", "conversations", "instruction", "prompt", "completion", "text")
_ASKED = ("question", "query", "problem", "user", "input", "instruction", "prompt")
_ANSWERED = ("answer", "response", "solution", "assistant", "target", "output", "chosen")
_REFUSED = {
    "chosen": "preference data; --columns completion=chosen learns from the preferred answer",
    "rejected": "preference data; potstill learns from one answer to a prompt",
    "input_ids": "already tokenized; potstill needs the text",
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos"),
        "not text; only text can be learned",
    ),
}


class Row(dict[str, Any]):
    """A conversation or prompt that knows where it was read; equal to a dict of the same keys."""

    place: str = ""


def as_conversation(row: dict[str, Any], place: str) -> Row:
    """Return ``{"messages", …}`` or ``{"text", …}`` from a row in any form. Raises: DataError."""
    optional = ("cut_off", "teacher_ids", "sampling", "reference")
    kept = {name: row[name] for name in optional if row.get(name)}
    _check_own(kept, place)
    _refuse_others(row, place)
    messages = messages_of(row, place)
    if messages is None and isinstance(row.get("text"), str):
        if row.get("tools") or row.get("system"):
            raise DataError(f"{place}: tools and system need messages, and this row has text")
        return _placed({"text": row["text"], **kept}, place)
    asked = messages is not None and messages[-1]["role"] != "assistant"
    if messages is None or not any(message["role"] == "assistant" for message in messages):
        if asked and "messages" in row:
            raise DataError(f"{place}: no assistant turn to learn from; {ANSWER_FIRST}")
        raise DataError(f"{place}: {_nearest(row, asked)}")
    # Nothing is learned after the last answer.
    while messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return _placed({"messages": messages, **_tools(row, place), **kept}, place)


def as_prompt(row: dict[str, Any], place: str) -> Row:
    """Return the row with ``messages`` that end with a user's turn. Raises: DataError."""
    _refuse_others(row, place)
    messages = without_answer(messages_of(row, place) or [])
    if not messages:
        expected = '{"prompt": …} or messages that end with a user turn'
        raise DataError(
            f"{place}: no prompt there (it has {_names(row)}); a prompt is {expected}"
            f"{_columns_hint(row, answer=False)}"
        )
    return _placed({**row, "messages": messages, **_tools(row, place)}, place)


def without_answer(messages: list[Message]) -> list[Message]:
    """Return the messages up to the last turn that is not the assistant's."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def renamed(row: dict[str, Any], columns: dict[str, str], place: str) -> dict[str, Any]:
    """Return the row with each column under its new name. Raises: DataError if one is missing."""
    if not columns:
        return row
    for old in columns.values():
        if old not in row:
            raise DataError(f"{place}: no column {old!r} (--columns); it has {_names(row)}")
    used = set(columns.values())
    used |= {"rejected"} if "chosen" in used else set()  # the preferred answer alone is learned
    others = {
        name: value for name, value in row.items() if name not in used and name not in FORM_COLUMNS
    }
    return {**others, **{new: row[old] for new, old in columns.items()}}


def messages_of(row: dict[str, Any], place: str) -> list[Message] | None:
    """Return a row's messages, with its ``system`` first; None if it has no such form."""
    found: Any = None
    if row.get("messages") is not None:
        found = row["messages"]
    elif row.get("conversations") is not None:
        found = from_sharegpt(row["conversations"], place)
    elif isinstance(row.get("instruction"), str):
        question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        found = [*_history(row, place), *_turns(question, row.get("output"))]
    elif row.get("prompt") is not None:
        found = [*_as_messages("user", row["prompt"], place)]
        if row.get("completion") is not None:
            found += _as_messages("assistant", row["completion"], place)
    if found is None:
        return None
    messages = checked_messages(without_none(found), place)
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str) or messages[0]["role"] == "system":
        raise DataError(f"{place}: system must be text, beside messages without a system turn")
    return [{"role": "system", "content": system}, *messages]


def _as_messages(role: str, given: Any, place: str) -> list[Any]:
    """Return text as one message of ``role``, and messages as they are."""
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    column = "prompt" if role == "user" else "completion"
    if isinstance(given, list):
        first = given[0] if given and isinstance(given[0], dict) else {}
        if role == "assistant" and first.get("role") in ("system", "user"):
            found = f"{column} begins with a turn of the {first['role']}"
            raise DataError(f"{place}: {found}; if it is a whole conversation, call it messages")
        return given
    raise DataError(f"{place}: {column} must be text or a list of messages")


def _turns(question: str, answer: Any) -> list[Message]:
    asked = {"role": "user", "content": question}
    return [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]


def _history(row: dict[str, Any], place: str) -> list[Message]:
    """Return the earlier turns of an Alpaca row: ``history``, a list of question and answer."""
    history = row.get("history") or []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{place}: history must be a list of [question, answer]")
    return [turn for question, answer in history for turn in _turns(question, answer)]


def _tools(row: dict[str, Any], place: str) -> dict[str, Any]:
    tools = row.get("tools")
    checked = checked_tools(tools, place) if tools is not None else []
    return {"tools": checked} if checked else {}


def _check_own(kept: dict[str, Any], place: str) -> None:
    """Check the columns that `potstill generate` writes: a data set may use the names otherwise."""
    kinds = {"cut_off": bool, "teacher_ids": list, "sampling": dict, "reference": str}
    needs = {
        "cut_off": "true or false",
        "teacher_ids": "a list of token ids",
        "sampling": "an object with temperature",
        "reference": "an answer as text",
    }
    for name, value in kept.items():
        right = isinstance(value, kinds[name])
        if name == "teacher_ids" and right:
            right = all(type(i) is int and i >= 0 for i in value)
        if name == "sampling" and right:
            right = isinstance(value.get("temperature"), int | float)
        if not right:
            raise DataError(f"{place}: {name} must be {needs[name]}; remove or rename the column")


def _refuse_others(row: dict[str, Any], place: str) -> None:
    for name, reason in _REFUSED.items():
        if row.get(name) not in (None, [], ""):
            raise DataError(f"{place}: has {name}: {reason}")
    if isinstance(row.get("label"), bool):
        raise DataError(
            f"{place}: has label ({row['label']}): answers marked good or bad; keep the good ones, "
            "without the column"
        )


def _nearest(row: dict[str, Any], asked: bool) -> str:
    hint = f"; {ANSWER_FIRST}" if asked or "prompt" in row else ""
    return f"has {_names(row)}; needs {FORMS}{_columns_hint(row) or hint}"


def _columns_hint(row: dict[str, Any], *, answer: bool = True) -> str:
    """Return the ``--columns`` that would read the row, if its names tell."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    asked = next((name for name in _ASKED if name in texts), None)
    answered = next((name for name in _ANSWERED if name in texts and name != asked), None)
    if asked is None or (answer and answered is None):
        return ""
    wanted = f"prompt={asked}" + (f",completion={answered}" if answer else "")
    return f"; try --columns {wanted}"


def _names(row: dict[str, Any]) -> str:
    return ", ".join(sorted(row)) or "no keys"


def _placed(row: dict[str, Any], place: str) -> Row:
    placed = Row(row)
    placed.place = place
    return placed
