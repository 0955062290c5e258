"""Open finished runs from their folders, and check that they can be compared.

evaluation.json stores sums per conversation, so no model is opened here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
        """Return the sums of each held-out conversation, before and after training."""
        sums: dict[str, Any] = self.evaluation["conversations"]
        return sums

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        return int(self.config.get("seed", 0))

    def answers(self) -> list[dict[str, Any]] | None:
        """Return the student's answers to held-out prompts, if any. Raises: RunFolderError."""
        return read_answers(self.folder)


def read_answers(folder: Path) -> list[dict[str, Any]] | None:
    """Return the answers that `potstill compare` wrote, or None if there is no such file.

    Raises: RunFolderError if the file is damaged.
    """
    path = folder / ANSWERS
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        texts = [row[name] for row in rows for name in ("prompt", "teacher")]
        if all(isinstance(text, str) for text in texts) and all(row["messages"] for row in rows):
            return rows
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise RunFolderError(f"{path}: damaged; delete it, and `potstill compare` makes it again")


def open_run(folder: str | Path) -> FinishedRun:
    """Open a run. Raises: RunFolderError if it is no run, is not finished, or is damaged."""
    run = RunFolder(folder)
    opened = FinishedRun(run.path, run.read_config(), run.read_evaluation())
    rerun = "delete it and run the same command again"
    if "conversations" not in opened.evaluation:
        raise RunFolderError(f"{run.evaluation}: has no sums per conversation; {rerun}")
    if not _has_whole_sums(opened):
        raise RunFolderError(f"{run.evaluation}: damaged (sums per conversation); {rerun}")
    return opened


def _has_whole_sums(run: FinishedRun) -> bool:
    """Return True if every column of sums has one finite value per prompt."""
    try:
        sizes = {len(run.conversations["prompts"])}
        for when in ("before", "after"):
            for pair in measure_ratios(run.conversations[when]).values():
                sizes |= {len(column) if np.isfinite(column).all() else 0 for column in pair or ()}
        return len(sizes) == 1 and min(sizes) > 0 and isinstance(run.evaluation["teacher"], dict)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def refuse_unlike(runs: list[FinishedRun]) -> None:
    """Check that all runs had the same teacher, data and budget.

    Raises: RunFolderError that names what differs.
    """
    first = runs[0]
    for run in runs[1:]:
        for (what, one), other in zip(
            _required_equal(first).items(), _required_equal(run).values(), strict=True
        ):
            if one != other:
                raise RunFolderError(
                    f"{first.folder} and {run.folder} cannot be compared: {what} is {_short(one)} "
                    f"in the first and {_short(other)} in the second; train both with the same"
                )


def _required_equal(run: FinishedRun) -> dict[str, Any]:
    """Return what must be equal in all runs of a comparison, by its name in an error message."""
    config, kept = run.config, run.conversations
    seconds = config.get("seconds")
    steps, batch, accumulation = (
        config.get(name) or 1 for name in ("max_steps", "batch_size", "gradient_accumulation_steps")
    )
    conversations = None if seconds else steps * batch * accumulation
    return {
        "teacher": config.get("teacher"),
        "the teacher's quantization": (run.evaluation.get("quantization") or {}).get(
            "quantization"
        ),
        "the held-out data (fingerprint)": kept.get("fingerprint"),
        "the training data (fingerprint of its prompts)": kept.get("train_prompts"),
        "seconds": seconds,
        "the budget max_steps × batch_size × gradient_accumulation_steps": conversations,
        "the text within max_length, in bytes,": sum(kept["after"]["bytes"]),
    }


def same_tokens(runs: list[FinishedRun]) -> bool:
    """Return True if all students split the held-out text into equally many tokens.

    Otherwise nats per token of two students are different quantities.
    """
    first = runs[0].conversations["after"]["tokens"]
    return all(run.conversations["after"]["tokens"] == first for run in runs)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
