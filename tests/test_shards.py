from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import RunFolderError
from potstill.shards import ShardStore

MADE_WITH = {"teacher": "t", "temperature": 0.7}


def store_in(folder: Path, made_with: dict[str, Any] = MADE_WITH) -> ShardStore:
    return ShardStore(folder, made_with, subfolder="rows", shard_rows=6)


def rows(start: int, count: int) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"key": f"{n:032x}", "text": f"answer é\u2028 {n}", "ids": [n]} for n in numbers]


def keys(count: int) -> list[str]:
    return [row["key"] for row in rows(0, count)]


def fill(folder: Path, units: int = 5) -> None:
    with store_in(folder) as store:
        for number in range(units):
            store.append(rows(3 * number, 3))


def test_rows_are_read_in_the_order_of_the_keys(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    with store_in(tmp_path / "a") as store:
        assert len(store) == 15
        assert list(store.read([*keys(15)[::-1], "unknown"])) == rows(0, 15)[::-1]


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_file_cut_at_any_byte_keeps_exactly_its_complete_units(
    tmp_path: Path, shard: int
) -> None:
    fill(tmp_path / "a", 2 * shard + 1)
    path = tmp_path / "a" / "rows" / f"{shard:05}.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with store_in(tmp_path / "a") as store:
            complete = sum(end <= length for end in ends) // 3 * 3
            assert len(store) == 6 * shard + complete
            assert path.read_bytes() == whole[: ends[complete - 1] if complete else 0]


def test_a_damaged_or_missing_shard_is_reported_and_its_rows_are_missing(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    path = tmp_path / "a" / "rows" / "00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"answer", b"ansver", 1))
    with store_in(tmp_path / "a") as store:
        assert store.damaged == [str(path)]
        assert [key in store for key in keys(15)] == [True] * 6 + [False] * 6 + [True] * 3
        store.append(rows(6, 3))
        store.append(rows(9, 3))
    (tmp_path / "a" / "rows" / "00000.jsonl").unlink()
    with store_in(tmp_path / "a") as store:
        assert len(store.damaged) == 1
        assert [key in store for key in keys(15)] == [False] * 6 + [True] * 9


def test_a_changed_setting_is_an_error_that_names_it(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    message = "made with temperature 0.7, not 0.9; give another --output-dir"
    with pytest.raises(RunFolderError, match=message):
        store_in(tmp_path / "a", {**MADE_WITH, "temperature": 0.9})


def test_a_folder_with_other_files_is_refused_but_not_one_left_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / "a" / "rows").mkdir(parents=True)
    (tmp_path / "a" / ".lock").touch()
    fill(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        store_in(tmp_path / "b")
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        store_in(tmp_path / "a")


def test_a_folder_is_open_in_one_process_at_a_time(tmp_path: Path) -> None:
    with store_in(tmp_path / "a"), pytest.raises(RunFolderError, match="another process"):
        store_in(tmp_path / "a").__enter__()


def test_the_manifest_holds_the_row_count_and_checksum_of_sealed_shards(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    shards = json.loads((tmp_path / "a" / "manifest.json").read_text())["shards"]
    assert [(name, shard["rows"], len(shard["sha256"])) for name, shard in shards.items()] == [
        ("00000.jsonl", 6, 64),
        ("00001.jsonl", 6, 64),
    ]
