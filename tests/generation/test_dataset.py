from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from potstill.data.duplicates import NearDuplicates
from potstill.data.words import ngrams, words
from potstill.errors import ConfigError, DataError
from potstill.generation import filters, write_dataset
from potstill.generation.card import WHAT
from potstill.generation.dataset import likeliest, shortest, sift

CHECKS = {"empty": filters.empty, "cut_off": filters.cut_off}


def row(text: str, prompt: str = "why", **more: Any) -> dict[str, Any]:
    user = {"role": "user", "content": prompt}
    return {"messages": [user, {"role": "assistant", "content": text}], **more}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_each_row_is_kept_or_dropped_for_a_reason_explained_in_the_card(tmp_path: Path) -> None:
    text = "the rain falls on the old town and its river, all day and all night long"
    rows = [
        row(text),
        row(""),
        row("b", cut_off=True),
        row(text),
        row(text + "!", "how", sampling={"x": {"y": 1}}),
        row("other\u2028text"),
    ]
    counts = write_dataset(tmp_path, rows, CHECKS, similarity=0.8)
    assert counts == {"kept": 2, "empty": 1, "cut_off": 1, "duplicate": 1, "near_duplicate": 1}
    assert counts.keys() <= WHAT.keys()
    assert read(tmp_path / "conversations.jsonl") == [rows[0], rows[5]]
    dropped = read(tmp_path / "dropped.jsonl")
    reasons = sorted(row.pop("reason") for row in dropped)
    assert reasons == ["cut_off", "duplicate", "empty", "near_duplicate"]
    assert all(one in rows for one in dropped)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["conversations.jsonl", "dropped.jsonl"]


def test_no_row_left_is_an_error_with_the_reasons_and_keeps_the_dropped_rows(
    tmp_path: Path,
) -> None:
    rows = [row(""), row(" ", "x"), row("b", cut_off=True)]
    with pytest.raises(DataError, match=r"no answer is left \(2 empty, 1 cut_off\)"):
        write_dataset(tmp_path, rows, CHECKS)
    assert [path.name for path in tmp_path.iterdir()] == ["dropped.jsonl"]


def test_one_of_the_answers_that_passed_is_chosen_per_prompt() -> None:
    rows = [row("cc"), row(""), row("b"), row("aaa", "how")]
    reasons = [reason for _, reason in sift(rows, CHECKS, shortest)]
    assert reasons == ["not_chosen", "empty", None, None]
    pair = [row("a", nats_per_token=2.0), row("bb", nats_per_token=1.0)]
    assert likeliest(pair) is pair[1]
    pair = [row("a", cut_off=True), row("long", cut_off=False)]
    assert shortest(pair) is pair[1]


def test_a_users_function_that_fails_or_returns_no_row_is_an_error() -> None:
    with pytest.raises(ConfigError, match="user function failed"):
        list(sift([row("a")], {"user": lambda row: row["none"]}))
    with pytest.raises(ConfigError, match="instead of one of the rows"):
        list(sift([row("a"), row("b")], {}, lambda rows: {}))


def test_near_duplicates_are_the_pairs_of_high_jaccard_similarity() -> None:
    random.seed(0)
    for changed, expected in ((1, True), (2, True), (20, False), (40, False)):
        for _ in range(20):
            original = [f"w{random.randrange(10_000)}" for _ in range(100)]
            other = list(original)
            for place in random.sample(range(100), changed):
                other[place] = "changed"
            a, b = (ngrams(words(" ".join(text)), 3) for text in (original, other))
            jaccard = len(a & b) / len(a | b)
            assert (jaccard > 0.85) == expected
            found = NearDuplicates(0.8)
            found.add(" ".join(original))
            found.add(" ".join(other))
            assert found.flags().tolist() == [False, expected]


def test_only_the_first_of_many_near_duplicates_is_kept() -> None:
    found = NearDuplicates(0.8)
    rest = "falls on the old town and on its river and on the hills behind it"
    texts = [f"{subject} {rest}" for subject in ("rain", "snow", "hail")]
    for text in [*texts, "something else", *texts] * 400:
        found.add(text)
    flags = found.flags().tolist()
    assert not flags[0]
    assert sum(not flag for flag in flags) <= 4
    assert all(flags[7:])


def test_without_texts_there_are_no_flags() -> None:
    assert NearDuplicates(0.8).flags().tolist() == []
