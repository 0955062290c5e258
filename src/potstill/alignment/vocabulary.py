"""Do two tokenizers of one family agree, and on how many rows?

Rows of a head beyond its tokenizer's length are padding: no text produces them. So tokens are compared, never sizes.
"""

from __future__ import annotations

from typing import Any

from potstill.errors import VocabularyMismatch


def shared_rows(teacher_tokenizer: Any, student_tokenizer: Any) -> int:
    """How many leading rows of both heads stand for the same tokens: both are cut to these and renormalised.

    Both tokenizers may be longer than that only if the rest are tokens which one of them lacks altogether (a longer list of
    added tokens). Raises: VocabularyMismatch naming the first id whose tokens differ.
    """
    count = min(len(teacher_tokenizer), len(student_tokenizer))
    teacher_tokens = teacher_tokenizer.convert_ids_to_tokens(list(range(count)))
    student_tokens = student_tokenizer.convert_ids_to_tokens(list(range(count)))
    if teacher_tokens == student_tokens:
        return count
    first = next(i for i in range(count) if teacher_tokens[i] != student_tokens[i])
    raise VocabularyMismatch(
        f"teacher and student have different tokenizers: id {first} is {teacher_tokens[first]!r} in the teacher's and "
        f"{student_tokens[first]!r} in the student's, so their logits cannot be compared; use --method text, or cross"
    )
