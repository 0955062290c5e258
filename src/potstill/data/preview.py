"""Show conversations as they will be learned: what is masked, and what is learned."""

from __future__ import annotations

import os
import sys

from potstill.data.conversations import Conversation
from potstill.data.encoding import learned_parts
from potstill.protocols import Tokenizer

_GREEN, _GREY, _RESET = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"


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
