"""Read and write the data and the answers of a comparison's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from potstill.comparison.compare_runs import Answers
from potstill.comparison.finished_runs import ANSWERS
from potstill.data import read_conversations
from potstill.data.conversations import with_reference
from potstill.evaluation.held_out import last_question, prompts_of
from potstill.generation import answer_prompts
from potstill.models import ModelOpener
from potstill.processes import print_main
from potstill.run_folder import write_whole


def read_data(folder: Path) -> tuple[list[Any], list[Any]] | None:
    """Return the copied training and held-out conversations; None if there is no copy yet."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if not held_out.is_file():
        return None
    return list(read_conversations(train)), list(read_conversations(held_out))


def write_data(folder: Path, train: list[Any], held_out: list[Any]) -> None:
    """Copy the data; write reference.jsonl, too, if every training row has a reference answer."""
    folder.mkdir(exist_ok=True)
    if all("reference" in row and "messages" in row for row in train):
        write_rows(folder / "reference.jsonl", [with_reference(row) for row in train])
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "held_out.jsonl", held_out)  # the last: it marks the copy as complete


def write_answers(
    folder: Path, held_out: list[Any], opener: ModelOpener, model: str, base: str, **sampling: Any
) -> None:
    """Write the answers of ``model``, and the teacher's, to held-out conversations with an answer.

    ``base`` has the tokenizer. Does nothing if the answers are there, or ``held_out`` is empty.
    """
    if not held_out or (folder / ANSWERS).is_file():
        return
    print_main(f"  {len(held_out)} answers of {model}")
    prompts = prompts_of(held_out)
    answers = answer_prompts(opener.model(model), opener.tokenizer(base), prompts, **sampling)
    rows = [
        {"prompt": last_question(row), "teacher": row["messages"][-1]["content"], **answer}
        for row, answer in zip(held_out, answers, strict=True)
    ]
    folder.mkdir(exist_ok=True)
    write_rows(folder / ANSWERS, rows)


def write_rows(path: Path, rows: Answers) -> None:
    """Write JSON Lines, completely or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
