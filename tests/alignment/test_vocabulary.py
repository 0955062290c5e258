from __future__ import annotations

import pytest

from alignment.toys import letters, sentencepiece
from conftest import toy_tokenizer
from potstill.alignment import compare_vocabularies, shared_rows
from potstill.errors import VocabularyMismatch


def test_the_same_tokenizer_is_the_same() -> None:
    compared = compare_vocabularies(toy_tokenizer(), toy_tokenizer())
    assert (compared.relation, compared.shared_rows, compared.first_difference) == (
        "same",
        266,
        None,
    )
    assert compared.shared_tokens == compared.teacher_tokens == compared.student_tokens == 266


def test_a_longer_list_of_added_tokens_is_the_same_family_and_cut() -> None:
    longer = toy_tokenizer(added=("<|tool|>",))
    assert compare_vocabularies(longer, toy_tokenizer()).relation == "same family"
    assert shared_rows(longer, toy_tokenizer()) == shared_rows(toy_tokenizer(), longer) == 266


def test_the_same_tokens_under_other_ids_are_permuted_and_refused_by_the_first() -> None:
    one, other = letters("ab", "a b"), letters("ab", "a b", shift=1)
    compared = compare_vocabularies(one, other)
    assert (compared.relation, compared.first_difference) == ("permuted", (0, "a", "b"))
    with pytest.raises(
        VocabularyMismatch, match="id 0 is 'a' in the teacher's and 'b' in the student's"
    ):
        shared_rows(one, other)


def test_tokens_are_compared_by_bytes_and_not_by_spelling() -> None:
    compared = compare_vocabularies(toy_tokenizer(), sentencepiece())
    assert compared.relation == "different"
    assert compared.shared_tokens == 256 + len({b" t", b"he", b" the", b"in"})
