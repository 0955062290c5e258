"""Check the messages of a conversation."""

from __future__ import annotations

from typing import Any

from potstill.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


def checked_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    """Return the messages if each has a known role and text. Raises: DataError."""
    if not isinstance(messages, list) or not messages:
        need = 'a list of {"role", "content"} that is not empty'
        raise DataError(f"{place}: messages must be {need}")
    for number, message in enumerate(messages, 1):
        known = isinstance(message, dict) and message.get("role") in ROLES
        if not (known and isinstance(message.get("content"), str)):
            need = f"a role ({', '.join(ROLES)}) and its content as text"
            raise DataError(f"{place}: message {number} needs {need}")
    return messages
