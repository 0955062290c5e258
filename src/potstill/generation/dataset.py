"""From answers to a data set: filtered, chosen among, without duplicates, and described.

FOLDER/conversations.jsonl  what is to be learned: a row is {"messages", "cut_off", "teacher_ids", "sampling", "key"}
FOLDER/dropped.jsonl        what is not, each with its "reason"

Rows are read and written one by one; what stays in memory is 16 bytes a text for exact duplicates and 384 for near ones.
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
from typing import Any

from potstill.errors import ConfigError, DataError
from potstill.generation.duplicates import NearDuplicates
from potstill.generation.filters import Filter, Row, answer
from potstill.generation.words import words

CONVERSATIONS, DROPPED = "conversations.jsonl", "dropped.jsonl"

Choose = Callable[[Sequence[Row]], Row]
"""The one of a prompt's answers to be kept."""


def shortest(rows: Sequence[Row]) -> Row:
    """The shortest; of the complete ones if there are any."""
    return min(rows, key=lambda row: (bool(row.get("cut_off")), len(answer(row))))


def likeliest(rows: Sequence[Row]) -> Row:
    """The likeliest by the teacher, token by token: the whole probability would choose the shortest."""
    return min(rows, key=lambda row: float(row["nats_per_token"]))


SHORT_WORDS = 20
CHOICES: dict[str, Choose | None] = {"all": None, "shortest": shortest, "likeliest": likeliest}


def sift(rows: Iterable[Row], filters: dict[str, Filter], choose: Choose | None = None) -> Iterator[tuple[Row, str | None]]:
    """Each row, with the reason to drop it or None. Rows of one prompt stand together.

    In this order: the filters; among what is left of a prompt, the choice; then exact duplicates of an earlier row.
    Raises: ConfigError if a function of the user's fails.
    """
    seen: set[bytes] = set()
    for _, group in itertools.groupby(rows, key=lambda row: row["messages"][:-1]):
        answers = [(row, _reason(row, filters)) for row in group]
        left = [row for row, reason in answers if reason is None]
        chosen = _called("choice", choose, left) if choose and len(left) > 1 else None
        for row, reason in answers:
            if reason is None and chosen is not None and row is not chosen:
                reason = "not_chosen"
            if reason is None:
                said = hashlib.sha256(json.dumps([m["content"] for m in row["messages"]]).encode()).digest()[:16]
                reason = "duplicate" if said in seen else None
                seen.add(said)
            yield row, reason


def write_dataset(
    folder: Path, rows: Iterable[Row], filters: dict[str, Filter], *, choose: Choose | None = None, similarity: float = 1.0
) -> dict[str, int]:
    """Sift ``rows`` into two files in ``folder``. Returns how many were ``kept``, and how many were dropped by each reason.

    ``similarity``: answers at least so similar to an earlier one are near duplicates; 1 looks for none. Files are there whole or
    not at all. Raises: DataError if no row is left; ConfigError as `sift`.
    """
    counts: Counter[str] = Counter()
    near = NearDuplicates(similarity) if similarity < 1 else None
    sifted, kept, dropped = (folder / f".{name}.unfinished" for name in ("sifted", "train", "dropped"))
    try:
        with sifted.open("w", encoding="utf-8") as left, dropped.open("w", encoding="utf-8") as aside:
            for row, reason in sift(rows, filters, choose):
                if reason is not None:
                    counts[reason] += 1
                    aside.write(_line({**row, "reason": reason}))
                    continue
                left.write(_line(row))
                if near:
                    near.add(_compared(row))
        flags = near.flags().tolist() if near else itertools.repeat(False)
        with sifted.open("rb") as left, kept.open("wb") as out, dropped.open("ab") as aside:
            for line, is_near in zip(left, flags, strict=False):
                counts["near_duplicate" if is_near else "kept"] += 1
                (aside if is_near else out).write(line[:-2] + b', "reason": "near_duplicate"}\n' if is_near else line)
        os.replace(dropped, folder / DROPPED)
        if not counts["kept"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common() if count)
            raise DataError(
                f"{folder}: no answer is left ({reasons}); look at dropped.jsonl there, and keep what should stay (--keep)"
            )
        os.replace(kept, folder / CONVERSATIONS)
    finally:
        for path in (sifted, kept, dropped):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return dict(counts)


def _compared(row: Row) -> str:
    """What is compared with other rows: the answer; of a short one, as many questions have it, the question too."""
    said = answer(row)
    if len(words(said)) >= SHORT_WORDS:
        return said
    return " ".join(message["content"] for message in row["messages"])


def _reason(row: Row, filters: dict[str, Filter]) -> str | None:
    return next((name for name, is_bad in filters.items() if _called(name, is_bad, row)), None)


def _called(name: str, function: Callable[..., Any], argument: Any) -> Any:
    """What ``function`` gives. Raises: ConfigError if it fails, or, as a choice, gives something else than one of the rows."""
    try:
        result = function(argument)
    except Exception as error:  # the user's code raises what it likes
        raise ConfigError(f"the {name} function failed ({type(error).__name__}: {error}); mend it") from error
    if isinstance(argument, list) and not any(result is row for row in argument):
        raise ConfigError(f"the {name} function gave {type(result).__name__} instead of one of the rows it was given; mend it")
    return result


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
