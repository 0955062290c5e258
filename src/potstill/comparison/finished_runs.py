"""Runs that have come to their end, as they stand in their folders, and whether they can be compared at all.

A run's evaluation.json keeps what each conversation adds up to, so nothing here opens a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.errors import RunFolderError
from potstill.evaluation.scores import measure_ratios
from potstill.run_folder import RunFolder

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class FinishedRun:
    """One run: one method with one seed."""

    folder: Path
    config: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def conversations(self) -> dict[str, Any]:
        """What each held-out conversation adds up to, before and after."""
        kept: dict[str, Any] = self.evaluation["conversations"]
        return kept

    @property
    def seed(self) -> int:
        """Of the data's order."""
        return int(self.config.get("seed", 0))

    def answers(self) -> list[dict[str, Any]] | None:
        """What the student answered to held-out prompts, if it was asked. Raises: RunFolderError."""
        return read_answers(self.folder)


def read_answers(folder: Path) -> list[dict[str, Any]] | None:
    """Answers beside the teacher's, as `potstill compare` keeps them; None if there are none. Raises: RunFolderError."""
    path = folder / ANSWERS
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if all(
            isinstance(row[name], str) for row in rows for name in ("prompt", "teacher")
        ) and all(row["messages"] for row in rows):
            return rows
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise RunFolderError(f"{path}: damaged; delete it, and `potstill compare` asks again")


def open_run(folder: str | Path) -> FinishedRun:
    """A run's settings and measurements. Raises: RunFolderError if it is no run, is not finished, or is damaged."""
    run = RunFolder(folder)
    opened = FinishedRun(run.path, run.read_config(), run.read_evaluation())
    if "conversations" not in opened.evaluation:
        raise RunFolderError(
            f"{run.evaluation}: keeps no sums a conversation; delete it and give the run's command again"
        )
    try:
        columns = [
            pair
            for when in ("before", "after")
            for pair in measure_ratios(opened.conversations[when]).values()
            if pair
        ]
        sizes = {len(column) for pair in columns for column in pair} | {
            len(opened.conversations["prompts"])
        }
        whole = (
            len(sizes) == 1 and min(sizes) > 0 and isinstance(opened.evaluation["teacher"], dict)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise RunFolderError(
            f"{run.evaluation}: damaged (its sums a conversation); delete it and give the run's command again"
        )
    return opened


def refuse_unlike(runs: list[FinishedRun]) -> None:
    """Raises: RunFolderError if two of the runs had another teacher, other data or another budget, naming what differs."""
    first = runs[0]
    for run in runs[1:]:
        for (what, one), other in zip(_alike(first).items(), _alike(run).values(), strict=True):
            if one != other:
                raise RunFolderError(
                    f"{first.folder} and {run.folder} cannot be compared: {what} is {_short(one)} in the one and {_short(other)} "
                    "in the other; train both with the same"
                )


def _alike(run: FinishedRun) -> dict[str, Any]:
    """What must be the same in all runs of a comparison, each with its name for an error."""
    config, kept = run.config, run.conversations
    seconds = config.get("seconds")
    seen = [
        config.get(name) or 1 for name in ("max_steps", "batch_size", "gradient_accumulation_steps")
    ]
    return {
        "teacher": config.get("teacher"),
        "the held-out data (fingerprint)": kept.get("fingerprint"),
        "the training data (fingerprint of its prompts)": kept.get("train_prompts"),
        "seconds": seconds,
        "the budget max_steps × batch_size × gradient_accumulation_steps": None
        if seconds
        else seen[0] * seen[1] * seen[2],
        "the tokenizer's cut, bytes of text within max_length,": sum(kept["after"]["bytes"]),
    }


def same_tokens(runs: list[FinishedRun]) -> bool:
    """Whether all students cut the text into as many tokens everywhere: else nats a token mean something else in each."""
    return all(
        run.conversations["after"]["tokens"] == runs[0].conversations["after"]["tokens"]
        for run in runs
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
