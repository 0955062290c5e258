"""Show conversations as they will be learned: what is masked, and what is learned."""

from __future__ import annotations

import itertools
import os
import sys

from potstill.data.answers import render_answers
from potstill.data.batches import IGNORED, encode_conversation
from potstill.data.conversations import Conversation
from potstill.protocols import Tokenizer

_GREEN, _GREY, _RESET = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"


def learned_parts(
    conversation: Conversation, tokenizer: Tokenizer, *, max_length: int | None = None
) -> list[tuple[str, bool]]:
    """Return the text of a conversation in parts, each with True if it is learned.

    What is beyond ``max_length`` tokens is left out. Raises: as `encode_conversation`.
    """
    row = encode_conversation(conversation, tokenizer, max_length=max_length)
    if "text" in conversation:
        text, is_text = conversation["text"], True
    else:
        text = render_answers(
            tokenizer, conversation["messages"], tools=conversation.get("tools")
        ).text
        is_text = False
    encoded = tokenizer(text, add_special_tokens=is_text, return_offsets_mapping=True)
    learned = [label != IGNORED for label in row["labels"]]
    ends = [end for _, end in encoded["offset_mapping"]][: len(learned)]
    ends += [len(text)] * (len(learned) - len(ends))
    parts, start = [], 0
    for flag, group in itertools.groupby(zip(learned, ends, strict=True), key=lambda one: one[0]):
        end = max(end for _, end in group)
        if end > start:
            parts.append((text[start:end], flag))
            start = end
    return parts


def preview(
    conversations: list[Conversation], tokenizer: Tokenizer, model: str, *, max_length: int
) -> str:
    """Return conversations as ``model`` will learn them, in color if the output is a terminal."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    color = sys.stdout.isatty() and not plain
    lines = [f"what {model} will learn is {'in green' if color else 'between ⟦ and ⟧'}"]
    for conversation in conversations:
        parts = learned_parts(conversation, tokenizer, max_length=max_length)
        place = getattr(conversation, "place", "")
        nothing = "" if any(flag for _, flag in parts) else " (nothing is learned)"
        lines += [f"\n--- {place}{nothing}", as_preview(parts, color=color).rstrip()]
    return "\n".join(lines)


def as_preview(parts: list[tuple[str, bool]], *, color: bool) -> str:
    """Return the parts as one text: what is learned in green, or between ⟦ and ⟧."""
    if color:
        marked = (
            # Some terminals forget the color at the end of a line.
            "\n".join(f"{_GREEN if flag else _GREY}{line}{_RESET}" for line in part.split("\n"))
            for part, flag in parts
        )
    else:
        marked = (f"⟦{part}⟧" if flag else part for part, flag in parts)
    return "".join(marked)
