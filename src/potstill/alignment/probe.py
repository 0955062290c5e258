"""A short text that tokenizers split differently, to compare two tokenizers without data."""

from __future__ import annotations

from potstill.protocols import Tokenizer

PROBE = "The year 2026, they said:\n\tif x != 'été': print(42)  # 雨 and 🌧️\r\n\n  Rain isn't dry."


def splits_alike(teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer) -> bool:
    """Return True if both split the probe alike; equal tokens do not imply equal merges."""
    tokenizers = (teacher_tokenizer, student_tokenizer)
    ids = [tokenizer.encode(PROBE, add_special_tokens=False) for tokenizer in tokenizers]
    return bool(ids[0] == ids[1])
