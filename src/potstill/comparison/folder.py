"""Read and write the data and the answers of a comparison's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from potstill.comparison.compare_runs import Answers
from potstill.comparison.finished_runs import ANSWERS
from potstill.data import read_conversations, without_answer
from potstill.data.conversations import with_reference
from potstill.evaluation.held_out import last_question
from potstill.generation import answer_prompts
from potstill.models import ModelOpener
from potstill.run_folder import write_whole

Conversations = list[Any]


def read_data(folder: Path) -> tuple[Conversations, Conversations] | None:
    """Return the copied training and held-out conversations; None if there is no copy yet."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if not held_out.is_file():
        return None
    return list(read_conversations(train)), list(read_conversations(held_out))


def write_data(folder: Path, train: Conversations, held_out: Conversations) -> None:
    """Copy the data; write reference.jsonl, too, if every training row has a reference answer."""
    folder.mkdir(exist_ok=True)
    if all("reference" in row and "messages" in row for row in train):
        write_rows(folder / "reference.jsonl", [with_reference(row) for row in train])
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "held_out.jsonl", held_out)  # the last: it marks the copy as complete


def write_answers(
    folder: Path,
    held_out: Conversations,
    opener: ModelOpener,
    *,
    model: str,
    tokenizer: str,
    limit: int,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Write a student's and the teacher's answers to the first ``limit`` held-out prompts.

    Does nothing if the answers are already there, or if no conversation ends with an answer.
    """
    answered = [
        row for row in held_out if row.get("messages", [{}])[-1].get("role") == "assistant"
    ][:limit]
    if not answered or (folder / ANSWERS).is_file():
        return
    print(f"  {len(answered)} answers of {model}", flush=True)
    prompts = [without_answer(row["messages"]) for row in answered]
    student, student_tokenizer = opener.model(model), opener.tokenizer(tokenizer)
    answers = answer_prompts(
        student, student_tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed
    )
    rows = [
        {"prompt": last_question(row), "teacher": row["messages"][-1]["content"], **answer}
        for row, answer in zip(answered, answers, strict=True)
    ]
    folder.mkdir(exist_ok=True)
    write_rows(folder / ANSWERS, rows)


def write_rows(path: Path, rows: Answers) -> None:
    """Write JSON Lines, completely or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
