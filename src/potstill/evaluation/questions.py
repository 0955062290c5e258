"""A file of questions → a task of lm-evaluation-harness, which then needs no network.

    {"question": "Which animal barks?", "choices": ["a cat", "a dog"], "answer": "a dog"}      the likeliest choice counts
    {"question": "What is the capital of France? Answer in one word.", "answer": "Paris"}      what the model writes counts,
                                                                                           whole or as a part

One JSON object a line, all of a file of one kind. "prompt" may stand for "question", and a choice's number, from 0, for the choice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from potstill.data.conversations import json_lines
from potstill.errors import DataError

ANSWER_TOKENS = 64
_SCORES = {"aggregation": "mean", "higher_is_better": True}


def read_questions(file: str) -> list[dict[str, Any]]:
    """Rows of ``question`` and ``answer``; with ``choices`` the answer is the number of one. Raises: DataError, naming the line."""
    rows = [_checked(row, place) for place, row in json_lines(Path(file).expanduser())]
    if not rows:
        raise DataError(f'{file}: no questions there; each line is {{"question", "choices", "answer"}} or {{"question", "answer"}}')
    for number, row in enumerate(rows, 1):
        if ("choices" in row) != ("choices" in rows[0]):
            raise DataError(f"{file}: question {number} and question 1 are of two kinds, one with choices; put each kind in a file")
    return rows


def _checked(row: dict[str, Any], place: str) -> dict[str, Any]:
    question, choices, answer = row.get("question", row.get("prompt")), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f'{place}: no question there; give it as text in "question"')
    if choices is None:
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f'{place}: no "answer" as text there, and no "choices"; a question needs an answer to compare with')
        return {"question": question, "answer": answer}
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(f'{place}: "choices" must be two or more texts')
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f'{place}: "answer" {answer!r} is none of the choices; give one of them, or its number from 0')
    return {"question": question, "choices": choices, "answer": answer}


def task_config(file: str, *, chat: bool) -> dict[str, Any]:
    """The file as lm-evaluation-harness's configuration of a task, named as the file.

    ``chat``: the question stands alone, a chat template will be laid around it. Raises: DataError as `read_questions`.
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
        how: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        return {**common, **how, "metric_list": metrics}
    generation = {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False}
    how = {"output_type": "generate_until", "doc_to_target": "answer", "generation_kwargs": generation, "process_results": _grades}
    return {**common, **how, "metric_list": [{"metric": name, **_SCORES} for name in ("exact_match", "contains")]}


def _grades(row: dict[str, Any], written: list[str]) -> dict[str, float]:
    """Whether the answer is the whole of what was written, and whether it stands in it: small and large letters are one."""
    wanted, found = (" ".join(re.findall(r"\w+", text.casefold())) for text in (row["answer"], written[0]))
    return {"exact_match": float(found == wanted), "contains": float(f" {wanted} " in f" {found} ")}
