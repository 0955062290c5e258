from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import ConfigError, DataError
from potstill.generation import filters, write_dataset
from potstill.generation.card import WHAT
from potstill.generation.dataset import likeliest, shortest, sift
from potstill.generation.duplicates import NearDuplicates
from potstill.generation.words import ngrams, words

CHECKS = {"empty": filters.empty, "cut_off": filters.cut_off}


def row(text: str, prompt: str = "why", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}], **more}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_row_is_kept_or_dropped_for_a_reason_that_the_card_explains(tmp_path: Path) -> None:
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
    assert sorted(row.pop("reason") for row in dropped) == ["cut_off", "duplicate", "empty", "near_duplicate"]
    assert all(one in rows for one in dropped)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conversations.jsonl", "dropped.jsonl"]


def test_nothing_left_is_an_error_that_says_why_and_leaves_the_dropped_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no answer is left \(2 empty, 1 cut_off\)"):
        write_dataset(tmp_path, [row(""), row(" ", "x"), row("b", cut_off=True)], CHECKS)
    assert [path.name for path in tmp_path.iterdir()] == ["dropped.jsonl"]


def test_of_several_answers_one_is_chosen_among_those_that_passed() -> None:
    rows = [row("cc"), row("", nats_per_token=0.0), row("b", nats_per_token=2), row("aaa", "how", nats_per_token=1.0)]
    reasons = [reason for _, reason in sift(rows, CHECKS, shortest)]
    assert reasons == ["not_chosen", "empty", None, None]
    assert likeliest([row("a", nats_per_token=2.0), row("bb", nats_per_token=1.0)])["messages"][1]["content"] == "bb"
    assert shortest([row("a", cut_off=True), row("long", cut_off=False)])["messages"][1]["content"] == "long"


def test_a_users_function_that_fails_or_chooses_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match="user function failed"):
        list(sift([row("a")], {"user": lambda row: row["none"]}))
    with pytest.raises(ConfigError, match="instead of one of the rows"):
        list(sift([row("a"), row("b")], {}, lambda rows: {}))


def test_near_duplicates_agree_with_the_jaccard_similarity_counted_by_hand() -> None:
    """Texts of a hundred words of which some are changed: far above the threshold all are found, far below none."""
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


def test_of_near_duplicates_the_first_stays_however_many_follow() -> None:
    found = NearDuplicates(0.8)
    texts = [f"{subject} falls on the old town and on its river and on the hills behind it" for subject in ("rain", "snow", "hail")]
    for text in [*texts, "something else", *texts] * 400:
        found.add(text)
    flags = found.flags().tolist()
    assert not flags[0]
    assert sum(not flag for flag in flags) <= 4
    assert all(flags[7:])


def test_no_text_gives_no_flag() -> None:
    assert NearDuplicates(0.8).flags().tolist() == []
