"""Do two vocabularies mean the same, and on how many rows?

Rows of a head beyond its tokenizer's length are padding: no text produces them. So tokens are compared, never sizes; and the bytes
they stand for, never their spelling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from potstill.alignment.token_bytes import token_bytes
from potstill.errors import OpaqueTokenizer, VocabularyMismatch


@dataclass(frozen=True)
class VocabularyComparison:
    """What two vocabularies have in common."""

    relation: Literal["same", "same family", "permuted", "different"]
    """``same``: every id means the same. ``same family``: one has more ids after those they share. ``permuted``: the same tokens
    under other ids. ``different``: anything else."""
    shared_rows: int
    """How many leading ids mean the same in both."""
    shared_tokens: int
    """How many tokens mean the same bytes in both (or are special and written alike), under whatever id."""
    teacher_tokens: int
    """How many different tokens the teacher has."""
    student_tokens: int
    """How many different tokens the student has."""
    first_difference: tuple[int, str | None, str | None] | None
    """The first id that means something else, with the teacher's and the student's token; None if there is none in both."""


def compare_vocabularies(teacher_tokenizer: Any, student_tokenizer: Any) -> VocabularyComparison:
    """Compare the tokens of two tokenizers by what they mean: their bytes, or their spelling where bytes cannot be recovered."""
    teacher, student = _meanings(teacher_tokenizer), _meanings(student_tokenizer)
    both = min(len(teacher), len(student))
    first = next((i for i in range(both) if teacher[i] != student[i]), None)
    teacher_set, student_set = set(teacher) - {None}, set(student) - {None}
    difference = None if first is None else (first, _spelled(teacher_tokenizer, first), _spelled(student_tokenizer, first))
    relation: Literal["same", "same family", "permuted", "different"] = "different"
    if first is None:
        relation = "same" if len(teacher) == len(student) else "same family"
    elif teacher_set == student_set:
        relation = "permuted"
    return VocabularyComparison(
        relation=relation,
        shared_rows=both if first is None else first,
        shared_tokens=len(teacher_set & student_set),
        teacher_tokens=len(teacher_set),
        student_tokens=len(student_set),
        first_difference=difference,
    )


def shared_rows(teacher_tokenizer: Any, student_tokenizer: Any) -> int:
    """How many leading rows of both heads stand for the same tokens: both are cut to these and renormalised.

    Both tokenizers may be longer than that only if the rest are tokens which one of them lacks altogether (a longer list of
    added tokens). Raises: VocabularyMismatch naming the first id whose tokens differ.
    """
    compared = compare_vocabularies(teacher_tokenizer, student_tokenizer)
    if compared.first_difference is None:
        return compared.shared_rows
    first, teacher_token, student_token = compared.first_difference
    raise VocabularyMismatch(
        f"teacher and student have different tokenizers: id {first} is {teacher_token!r} in the teacher's and "
        f"{student_token!r} in the student's, so their logits cannot be compared; use --method text, or cross"
    )


def _meanings(tokenizer: Any) -> list[bytes | str | None]:
    """For each id its bytes, or the spelling of a special token; None where there is no token."""
    spellings: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    try:
        tokens = token_bytes(tokenizer)
    except OpaqueTokenizer:
        return list(spellings)
    return [spelling if string is None else string for spelling, string in zip(spellings, tokens, strict=False)]


def _spelled(tokenizer: Any, i: int) -> str | None:
    spelling: str | None = tokenizer.convert_ids_to_tokens([i])[0]
    return spelling
