"""Turn answers into a data set: filter them, choose among samples, and remove duplicates.

FOLDER/conversations.jsonl  kept rows: {"messages", "cut_off", "teacher_ids", "sampling", "key"}
FOLDER/dropped.jsonl        dropped rows, each with its "reason"

Rows are streamed. Memory per text: 16 bytes for exact duplicates, 384 bytes for near duplicates.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from potstill.data.duplicates import NearDuplicates
from potstill.data.words import words
from potstill.errors import ConfigError, DataError
from potstill.generation.filters import Filter, Row, answer

CONVERSATIONS, DROPPED = "conversations.jsonl", "dropped.jsonl"

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Choose = Callable[[Sequence[Row]], Row]
"""Return the row to keep, of the rows of one prompt."""


def shortest(rows: Sequence[Row]) -> Row:
    """Return the shortest answer, of the complete ones if there are any."""
    return min(rows, key=lambda row: (bool(row.get("cut_off")), len(answer(row))))


def likeliest(rows: Sequence[Row]) -> Row:
    """Return the answer likeliest per token; the total likelihood would prefer short answers."""
    return min(rows, key=lambda row: float(row["nats_per_token"]))


SHORT_ANSWER_WORDS = 20
CHOICES: dict[str, Choose | None] = {"all": None, "shortest": shortest, "likeliest": likeliest}


def sift(
    rows: Iterable[Row], filters: dict[str, Filter], choose: Choose | None = None
) -> Iterator[tuple[Row, str | None]]:
    """Yield each row with the reason to drop it, or None. Rows of one prompt must be adjacent.

    The filters come first, then the choice among a prompt's remaining rows, then exact duplicates.
    Raises: ConfigError if a user's function fails.
    """
    seen: set[bytes] = set()
    for _, group in itertools.groupby(rows, key=lambda row: row["messages"][:-1]):
        answers = [(row, _reason(row, filters)) for row in group]
        passed = [row for row, reason in answers if reason is None]
        chosen = _choose(choose, passed) if choose and len(passed) > 1 else None
        for row, reason in answers:
            if reason is None and chosen is not None and row is not chosen:
                reason = "not_chosen"
            if reason is None:
                texts = json.dumps([message["content"] for message in row["messages"]])
                hashed = hashlib.sha256(texts.encode()).digest()[:16]
                reason = "duplicate" if hashed in seen else None
                seen.add(hashed)
            yield row, reason


def write_dataset(
    folder: Path,
    rows: Iterable[Row],
    filters: dict[str, Filter],
    *,
    choose: Choose | None = None,
    similarity: float = 1.0,
) -> dict[str, int]:
    """Write kept and dropped rows to two files in `folder`; return the count of every outcome.

    Answers at least `similarity` similar to an earlier one are near duplicates; 1 disables this.
    A file is complete or missing. Raises: DataError if no row is left; ConfigError as `sift`.
    """
    counts: Counter[str] = Counter()
    near = NearDuplicates(similarity) if similarity < 1 else None
    names = ("sifted", "train", "dropped")
    sifted, kept, dropped = (folder / f".{name}.unfinished" for name in names)
    try:
        with sifted.open("wb") as passed, dropped.open("wb") as rejected:
            for row, reason in sift(rows, filters, choose):
                if reason is not None:
                    counts[reason] += 1
                    rejected.write(_line({**row, "reason": reason}))
                    continue
                passed.write(_line(row))
                if near:
                    near.add(_text_to_compare(row))
        flags = near.flags().tolist() if near else itertools.repeat(False)
        with sifted.open("rb") as passed, kept.open("wb") as out, dropped.open("ab") as rejected:
            for line, is_near in zip(passed, flags, strict=False):
                counts["near_duplicate" if is_near else "kept"] += 1
                if is_near:
                    rejected.write(line[:-2] + b', "reason": "near_duplicate"}\n')
                else:
                    out.write(line)
        os.replace(dropped, folder / DROPPED)
        if not counts["kept"]:
            reasons = ", ".join(f"{count} {name}" for name, count in counts.most_common() if count)
            raise DataError(
                f"{folder}: no answer is left ({reasons}); see dropped.jsonl and --keep"
            )
        os.replace(kept, folder / CONVERSATIONS)
    finally:
        for path in (sifted, kept, dropped):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return dict(counts)


def _text_to_compare(row: Row) -> str:
    """Return the answer, with its prompt if it is short: many prompts share a short answer."""
    text = answer(row)
    if len(words(text)) >= SHORT_ANSWER_WORDS:
        return text
    return " ".join(message["content"] for message in row["messages"])


def _reason(row: Row, filters: dict[str, Filter]) -> str | None:
    return next((name for name, drops in filters.items() if _call(name, drops, row)), None)


def _choose(choose: Choose, rows: list[Row]) -> Row:
    chosen = _call("choice", choose, rows)
    if not any(chosen is row for row in rows):
        found = f"the choice function returned {type(chosen).__name__} instead of one of the rows"
        raise ConfigError(f"{found}; correct it")
    return chosen


def _call(name: str, function: Callable[[Argument], Result], argument: Argument) -> Result:
    try:
        return function(argument)
    except Exception as error:  # the user's code can raise anything
        message = f"the {name} function failed ({type(error).__name__}: {error}); correct it"
        raise ConfigError(message) from error


def _line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
