"""Make a task of lm-evaluation-harness, without network, from a file of questions.

    {"question": "Which animal barks?", "choices": ["a cat", "a dog"], "answer": "a dog"}
    {"question": "What is the capital of France? Answer in one word.", "answer": "Paris"}

One JSON object a line, all of one kind. With choices, the most likely one is the model's answer;
without, its text is compared, whole and as a part. "prompt" is read like "question", and a
choice's number, from 0, like the choice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from potstill.data.files import json_lines
from potstill.errors import DataError

ANSWER_TOKENS = 64
_SCORES = {"aggregation": "mean", "higher_is_better": True}


def read_questions(file: str) -> list[dict[str, Any]]:
    """Return rows of ``question`` and ``answer``; with ``choices`` the answer is a number.

    Raises: DataError with file and line.
    """
    rows = [_checked(row, place) for place, row in json_lines(Path(file).expanduser())]
    if not rows:
        forms = '{"question", "choices", "answer"} or {"question", "answer"}'
        raise DataError(f"{file}: no questions there; each line is {forms}")
    for number, row in enumerate(rows, 1):
        if ("choices" in row) != ("choices" in rows[0]):
            found = f"question {number} and question 1 are of two kinds, one with choices"
            raise DataError(f"{file}: {found}; put each kind in a file")
    return rows


def _checked(row: dict[str, Any], place: str) -> dict[str, Any]:
    question = row.get("question", row.get("prompt"))
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f'{place}: no question there; give it as text in "question"')
    if choices is None:
        if not isinstance(answer, str) or not answer.strip():
            found = 'no "answer" as text there, and no "choices"'
            raise DataError(f"{place}: {found}; a question needs an answer to compare with")
        return {"question": question, "answer": answer}
    are_texts = isinstance(choices, list) and all(isinstance(one, str) and one for one in choices)
    if not are_texts or len(choices) < 2:
        raise DataError(f'{place}: "choices" must be two or more texts')
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    if not is_number or answer not in range(len(choices)):
        need = "give one of them, or its number from 0"
        raise DataError(f'{place}: "answer" {answer!r} is none of the choices; {need}')
    return {"question": question, "choices": choices, "answer": answer}


def task_config(file: str, *, chat: bool) -> dict[str, Any]:
    """Return the harness's configuration of a task, named like the file.

    ``chat``: the question is used alone, because a chat template will be applied to it.
    Raises: DataError as `read_questions`.
    """
    import datasets

    rows = datasets.Dataset.from_list(read_questions(file))
    common: dict[str, Any] = {
        "task": file,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "doc_to_text": "question" if chat else "Question: {{question}}\nAnswer:",
    }
    if "choices" in rows.column_names:
        metrics = [{"metric": name, **_SCORES} for name in ("acc", "acc_norm")]
        how = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
    else:
        metrics = [{"metric": name, **_SCORES} for name in ("exact_match", "contains")]
        generation = {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False}
        common |= {"generation_kwargs": generation, "process_results": _grades}
        how = {"output_type": "generate_until"}
    return {**common, **how, "doc_to_target": "answer", "metric_list": metrics}


def _grades(row: dict[str, Any], written: list[str]) -> dict[str, float]:
    """Return 1 or 0: the text equals the answer; it contains it. Case does not count."""
    texts = (row["answer"], written[0])
    wanted, found = (" ".join(re.findall(r"\w+", text.casefold())) for text in texts)
    return {"exact_match": float(found == wanted), "contains": float(f" {wanted} " in f" {found} ")}
