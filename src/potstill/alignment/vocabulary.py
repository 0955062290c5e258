"""Compare two vocabularies, and count the leading ids that mean the same.

Head rows beyond the tokenizer's length are padding, so sizes are not compared. Tokens are compared
by their bytes: the same bytes can be spelled differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from potstill.alignment.token_bytes import token_bytes
from potstill.errors import OpaqueTokenizer, VocabularyMismatch
from potstill.protocols import Tokenizer

Relation = Literal["same", "same family", "permuted", "different"]


@dataclass(frozen=True)
class VocabularyComparison:
    """Hold the result of comparing two vocabularies."""

    relation: Relation
    """``same``: every id means the same. ``same family``: one has more ids after the shared ones.
    ``permuted``: the same tokens under other ids. ``different``: anything else."""
    shared_rows: int
    """Number of leading ids that mean the same in both."""
    shared_tokens: int
    """Number of tokens with the same bytes in both (or the same spelling, if special), any id."""
    teacher_tokens: int
    """Number of different tokens of the teacher."""
    student_tokens: int
    """Number of different tokens of the student."""
    first_difference: tuple[int, str | None, str | None] | None
    """The first id that differs, with the teacher's and the student's token; None if none does."""


def compare_vocabularies(
    teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer
) -> VocabularyComparison:
    """Compare two vocabularies by their tokens' bytes, or by spelling without known bytes."""
    teacher, student = _meanings(teacher_tokenizer), _meanings(student_tokenizer)
    shorter = min(len(teacher), len(student))
    first = next((i for i in range(shorter) if teacher[i] != student[i]), None)
    teacher_set, student_set = set(teacher) - {None}, set(student) - {None}
    difference = None
    relation: Relation = "different"
    if first is None:
        relation = "same" if len(teacher) == len(student) else "same family"
    else:
        spellings = [_spelling(one, first) for one in (teacher_tokenizer, student_tokenizer)]
        difference = (first, spellings[0], spellings[1])
        relation = "permuted" if teacher_set == student_set else "different"
    return VocabularyComparison(
        relation=relation,
        shared_rows=shorter if first is None else first,
        shared_tokens=len(teacher_set & student_set),
        teacher_tokens=len(teacher_set),
        student_tokens=len(student_set),
        first_difference=difference,
    )


def shared_rows(teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer) -> int:
    """Return the number of leading head rows with the same tokens; both heads are cut to these.

    One tokenizer may have more tokens after these. Raises: VocabularyMismatch with the first id
    whose tokens differ.
    """
    compared = compare_vocabularies(teacher_tokenizer, student_tokenizer)
    if compared.first_difference is None:
        return compared.shared_rows
    first, teacher_token, student_token = compared.first_difference
    raise VocabularyMismatch(
        f"teacher and student have different tokenizers: id {first} is {teacher_token!r} in the "
        f"teacher's and {student_token!r} in the student's, so their logits cannot be compared; "
        "use --method cross or --method text"
    )


def _meanings(tokenizer: Tokenizer) -> list[bytes | str | None]:
    """Return the bytes of each id, or a special token's spelling; None without a token."""
    spellings: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    try:
        tokens = token_bytes(tokenizer)
    except OpaqueTokenizer:
        return list(spellings)
    pairs = zip(spellings, tokens, strict=False)
    return [spelling if string is None else string for spelling, string in pairs]


def _spelling(tokenizer: Tokenizer, i: int) -> str | None:
    spelling: str | None = tokenizer.convert_ids_to_tokens([i])[0]
    return spelling
