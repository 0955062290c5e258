from __future__ import annotations

from typing import Any

import pytest

from conftest import conversations, sentencepiece_tokenizer, toy_tokenizer
from potstill.alignment import token_bytes
from potstill.alignment.probe import splits_alike
from potstill.doctor.measured_text import MOST_MEASURED, measure_text
from potstill.errors import DataError


def spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """The bytes that each token of ``text`` covers, a dummy prefix taken off."""
    tokens, found, at = token_bytes(tokenizer), [], 0
    for i in tokenizer.encode(text, add_special_tokens=False):
        found.append((at, at := at + len(tokens[i] or b"")))
    extra = at - len(text.encode())
    return [(max(0, start - extra), stop - extra) for start, stop in found]


def test_one_to_one_counts_the_tokens_that_cover_the_same_bytes_on_both_sides() -> None:
    texts = ["rain in the rain", "wet, wet\n\nthe on", "there is a train"]
    teacher, student = toy_tokenizer(), sentencepiece_tokenizer()
    found = measure_text(
        [{"text": text} for text in texts], teacher, student, same=False, max_length=64
    )
    # A text's first token is not learned, and its end token is, once a text.
    expected = sum(len(set(spans(teacher, text)) & set(spans(student, text)[1:])) for text in texts)
    assert found.one_to_one == expected + len(texts)
    assert found.supervised_tokens == sum(len(spans(student, text)) for text in texts)
    assert found.one_to_one <= found.roots <= found.supervised_tokens


def test_shares_follow_from_the_counts() -> None:
    found = measure_text(
        conversations(9), toy_tokenizer(), toy_tokenizer(), same=True, max_length=200
    )
    assert found.with_target == 1.0
    assert found.disagreeing == 0.0
    assert found.roots == found.one_to_one == found.supervised_tokens > 0
    assert found.teacher_tokens == found.tokens
    assert found.longest <= 200


def test_a_large_data_set_is_sampled_evenly() -> None:
    found = measure_text(
        conversations(MOST_MEASURED * 2 + 1),
        toy_tokenizer(),
        toy_tokenizer(),
        same=True,
        max_length=200,
    )
    assert found.of == MOST_MEASURED * 2 + 1
    assert MOST_MEASURED / 2 < found.conversations <= MOST_MEASURED


def test_no_conversations_is_a_data_error() -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        measure_text([], toy_tokenizer(), toy_tokenizer(), same=True, max_length=200)


def test_equal_tokens_can_still_split_a_text_differently() -> None:
    other = toy_tokenizer()
    assert splits_alike(toy_tokenizer(), other)
    other.add_tokens(["The year"])
    assert not splits_alike(toy_tokenizer(), other)
