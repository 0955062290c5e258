"""Compare the prompts of conversations: to hold some out, and to find leaks into training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from potstill.data.duplicates import NearDuplicates

NEAR = 0.8
"""Jaccard similarity (three-word runs) from which two prompts are near duplicates."""


def prompt_key(conversation: dict[str, Any]) -> str:
    """Return a hash of everything before the last answer; plain text is its own prompt.

    Equal keys mean equal prompts, character by character, tools included.

    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> other = [turns[0], {"role": "assistant", "content": "Good day"}]
    >>> prompt_key({"messages": turns}) == prompt_key({"messages": other})
    True
    """
    prompt: Any = conversation.get("text")
    if prompt is None:
        asked = [
            {name: value for name, value in turn.items() if value is not None and name != "weight"}
            for turn in _before_answer(conversation["messages"])
        ]
        prompt = [asked, conversation.get("tools") or []]
    text = json.dumps(prompt, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def near_duplicates(train: Iterable[dict[str, Any]], held_out: Iterable[dict[str, Any]]) -> int:
    """Return how many held-out prompts are nearly the same as a training prompt.

    Compares the words of all turns before the last answer, without the system prompt, which many
    conversations share. Case, white space and punctuation do not count.
    """
    known, asked = NearDuplicates(NEAR), NearDuplicates(NEAR)
    for found, conversations in ((known, train), (asked, held_out)):
        for conversation in conversations:
            found.add(_prompt_text(conversation))
    return int(asked.matches(known).sum())


def _before_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages before the last assistant turn; all of them without one."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: turns[-1]] if turns else messages


def _prompt_text(conversation: dict[str, Any]) -> str:
    if conversation.get("text") is not None:
        return str(conversation["text"])
    asked = [m for m in _before_answer(conversation["messages"]) if m["role"] != "system"]
    contents = (message.get("content") or "" for message in asked)
    return "\n".join(one if isinstance(one, str) else json.dumps(one) for one in contents)
