from __future__ import annotations

from typing import Any

import pytest

from alignment.toys import sentencepiece
from conftest import conversations, toy_tokenizer
from potstill.alignment import VocabularyCells, token_bytes
from potstill.data import IGNORED, PairEncoder, encode_conversation, tokenize_pairs
from potstill.errors import DataError

TEACHER, STUDENT = toy_tokenizer(), sentencepiece(prepend="first")
CELLS = VocabularyCells(TEACHER, STUDENT)
ENCODE = PairEncoder(TEACHER, STUDENT, CELLS)


def asked(answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "on"}, {"role": "assistant", "content": answer}],
        **more,
    }


def test_both_models_columns_are_those_of_their_own_template() -> None:
    row = ENCODE(asked("in the rain"))
    assert row is not None
    teacher, student = (
        encode_conversation(asked("in the rain"), TEACHER),
        encode_conversation(asked("in the rain"), STUDENT),
    )
    assert (row["input_ids"], row["labels"], row["answer_bytes"]) == (
        student["input_ids"],
        student["labels"],
        student["answer_bytes"],
    )
    assert (row["teacher_input_ids"], row["teacher_labels"]) == (
        teacher["input_ids"],
        teacher["labels"],
    )
    for column in ("teacher_index", "start", "stop", "depth"):
        assert len(row[column]) == len(row["input_ids"])


def test_every_target_is_at_the_same_bytes_of_the_answer() -> None:
    row = ENCODE(asked("in the\n\train 中 <0x0A> the"))
    assert row is not None
    t, s = token_bytes(TEACHER), token_bytes(STUDENT)
    for i, k in enumerate(row["teacher_index"]):
        if k >= 0:
            assert row["labels"][i] != IGNORED
            assert row["teacher_labels"][k] != IGNORED
            ahead = [
                b"".join(tokens[j] or b"" for j in ids if j != IGNORED)
                for tokens, ids in (
                    (t, row["teacher_labels"][k:]),
                    (s, row["labels"][i - row["depth"][i] :]),
                )
            ]
            assert ahead[0] == ahead[1].removesuffix(b" ")
    assert sum(k >= 0 for k in row["teacher_index"]) > 15


def test_a_cut_on_either_side_removes_the_targets_after_it() -> None:
    whole = ENCODE(asked("in the rain in the rain"))
    assert whole is not None
    for limit in range(len(whole["teacher_input_ids"]) - 12, 60):
        row = ENCODE(asked("in the rain in the rain"), max_length=limit)
        assert row is not None
        length = min(limit, len(whole["input_ids"]))
        reached = [k if k < limit else -1 for k in whole["teacher_index"][:length]]
        assert row["teacher_index"] == reached
        assert len(row["teacher_input_ids"]) == min(limit, len(whole["teacher_input_ids"]))


def test_sampled_teacher_ids_replace_the_tokenized_answer() -> None:
    sampled = [*map(TEACHER.convert_tokens_to_ids, ["Ġ", "t", "h", "e"]), 265]
    plain, row = (
        ENCODE(asked("x the")),
        ENCODE(asked("x the", teacher_ids=[TEACHER.convert_tokens_to_ids("x"), *sampled])),
    )
    assert plain is not None
    assert row is not None
    assert [v for v in row["teacher_labels"] if v != IGNORED][1:] == sampled
    assert len(row["teacher_input_ids"]) == len(plain["teacher_input_ids"]) + 3
    assert row["teacher_input_ids"][-len(sampled) - 1 : -1] == sampled
    assert ENCODE(asked("x the", teacher_ids=sampled)) == plain


def test_conversations_with_different_bytes_are_dropped_counted_and_shown() -> None:
    rows = [*conversations(6), asked("a <|im_end|> b")]
    dataset, counts = tokenize_pairs(rows, TEACHER, STUDENT, CELLS)
    assert len(dataset) == counts.conversations == 6
    assert counts.not_alignable == 1
    assert "1 left out (the tokenizers read different bytes, first in 'a <|im_end|> b')" in str(
        counts
    )
    assert counts.supervised_tokens == counts.roots + counts.interiors + counts.elsewhere
    assert counts.with_target > 0.7
    assert f"the teacher has a target for {counts.with_target:.1%}" in str(counts)


def test_data_without_an_alignable_conversation_is_an_error() -> None:
    with pytest.raises(DataError, match="different bytes in 1"):
        tokenize_pairs([asked("a <|im_end|> b")], TEACHER, STUDENT, CELLS)


def test_plain_text_is_aligned() -> None:
    row = ENCODE({"text": "x in the rain"})
    assert row is not None
    without = [
        label
        for label, k in zip(row["labels"], row["teacher_index"], strict=True)
        if label != IGNORED and k < 0
    ]
    assert STUDENT.convert_ids_to_tokens(without) == [
        "x"
    ]  # the teacher cannot predict its first token
