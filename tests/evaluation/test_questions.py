"""Files of questions, without the harness: reading, and errors with their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import DataError
from potstill.evaluation.questions import read_questions, task_config

BARKS = {"question": "which barks?", "choices": ["a cat", "a dog"], "answer": "a dog"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_answer_is_a_choice_or_its_number_and_a_prompt_is_a_question(tmp_path: Path) -> None:
    file = write(
        tmp_path / "q.jsonl",
        BARKS,
        {"prompt": "which mews?", "choices": ["a cat", "a dog"], "answer": 0},
    )
    assert [(row["question"], row["answer"]) for row in read_questions(file)] == [
        ("which barks?", 1),
        ("which mews?", 0),
    ]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({**BARKS, "question": " "}, "no question there"),
        ({**BARKS, "choices": ["a dog"]}, "two or more texts"),
        ({**BARKS, "choices": "a dog"}, "two or more texts"),
        ({**BARKS, "answer": "a cow"}, "'a cow' is none of the choices"),
        ({**BARKS, "answer": 2}, "2 is none of the choices"),
        ({**BARKS, "answer": True}, "True is none of the choices"),
        ({**BARKS, "choices": ["a dog", "a dog"]}, "'a dog' is none of the choices"),
        ({"question": "why?"}, "a question needs an answer"),
        ({"question": "how many?", "answer": 3}, "a question needs an answer"),
        ([], "each line holds one JSON object"),
    ],
)
def test_a_malformed_row_is_reported_with_its_line(tmp_path: Path, row: Any, found: str) -> None:
    file = write(tmp_path / "q.jsonl", BARKS, row)
    with pytest.raises(DataError, match=found) as refused:
        read_questions(file)
    assert str(refused.value).startswith(f"{file}:2: ")


def test_an_empty_file_and_one_of_two_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions there"):
        read_questions(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="question 2 and question 1 are of two kinds"):
        read_questions(
            write(tmp_path / "both.jsonl", BARKS, {"question": "why?", "answer": "because"})
        )
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("written", "exact", "contained"),
    [("paris.", 1, 1), ("The capital is Paris, of course", 0, 1), ("Parisian", 0, 0), ("", 0, 0)],
)
def test_a_written_answer_is_compared_by_its_words(
    tmp_path: Path, written: str, exact: int, contained: int
) -> None:
    task = task_config(
        write(tmp_path / "q.jsonl", {"question": "capital?", "answer": "Paris"}), chat=True
    )
    assert task["process_results"]({"answer": "Paris"}, [written]) == {
        "exact_match": exact,
        "contains": contained,
    }
