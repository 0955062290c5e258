from __future__ import annotations

from pathlib import Path

from potstill.generation import Answer, AnswerStore
from potstill.generation.store import parse_answer


def test_an_answer_is_read_as_it_was_added(tmp_path: Path) -> None:
    answer = Answer("0" * 32, "answer é\u2028", False, [1, 2], 0.5)
    with AnswerStore(tmp_path / "a", {}) as store:
        store.add([answer])
    with AnswerStore(tmp_path / "a", {}) as store:
        assert [parse_answer(row) for row in store.read([answer.key])] == [answer]
    assert (tmp_path / "a" / "answers" / "00000.jsonl").is_file()
