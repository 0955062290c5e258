from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.data import read_conversations, read_prompts
from potstill.data.conversations import with_reference
from potstill.errors import DataError


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n",
        encoding="utf-8",
    )
    return path


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_all_three_forms_become_conversations(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", {"messages": TURNS}, {"prompt": "a", "completion": "b"}, {"text": "t"}
    )
    assert list(read_conversations(file)) == [
        {"messages": TURNS},
        {"messages": TURNS},
        {"text": "t"},
    ]


def test_blank_lines_are_skipped_and_other_keys_left_out(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", {"text": "t", "source": 3}, "", {"text": "u", "cut_off": True}
    )
    assert list(read_conversations(file)) == [{"text": "t"}, {"text": "u", "cut_off": True}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"text": ', "a.jsonl:2: not JSON"),
        ("[1]", "a.jsonl:2: a JSON list"),
        ({"question": "x"}, "a.jsonl:2: has question; needs messages"),
        ({"prompt": "x"}, "let the teacher answer first"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "message 1 needs a role"),
        ({"messages": []}, "not empty"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, row: Any, says: str) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "good"}, row)
    with pytest.raises(DataError) as caught:
        list(read_conversations(file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_not_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_conversations(tmp_path / "latin.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        list(read_conversations(tmp_path / "none.parquet"))


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_of_the_datasets_library_are_read(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3).to_parquet(
        str(tmp_path / "a.parquet")
    )
    assert (
        list(read_conversations(tmp_path / "a.parquet", streaming=streaming))
        == [{"messages": TURNS}] * 3
    )


def test_prompts_lose_their_answers(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "a", "subject": "s"},
        {"messages": TURNS},
        {"prompt": "a", "completion": "b"},
    )
    assert [row["messages"] for row in read_prompts(file)] == [TURNS[:1]] * 3
    assert next(iter(read_prompts(file)))["subject"] == "s"


def test_the_demo_prompts_are_split_by_subject() -> None:
    from importlib import resources

    with resources.as_file(resources.files("potstill.data") / "demo_prompts.jsonl") as path:
        rows = list(read_prompts(path))
    subjects = {
        split: {row["subject"] for row in rows if row["split"] == split}
        for split in ("train", "held_out")
    }
    assert len(rows) >= 400
    assert not subjects["train"] & subjects["held_out"]
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)


def test_a_reference_replaces_the_last_answer_and_must_be_text(tmp_path: Path) -> None:
    (row,) = read_conversations(
        write(
            tmp_path / "a.jsonl", {"messages": [*TURNS, *TURNS], "reference": "c", "cut_off": True}
        )
    )
    assert with_reference(row) == {
        "messages": [*TURNS, TURNS[0], {"role": "assistant", "content": "c"}]
    }
    with pytest.raises(DataError, match=r"a\.jsonl:1: reference must be an answer as text"):
        list(read_conversations(write(tmp_path / "a.jsonl", {"messages": TURNS, "reference": 3})))
