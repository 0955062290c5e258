from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.errors import RunFolderError
from potstill.generation import Answer, AnswerStore

MADE_WITH = {"teacher": "t", "temperature": 0.7}


def answers(start: int, count: int) -> list[Answer]:
    return [Answer(f"{number:032x}", f"answer é\u2028 {number}", False, [number]) for number in range(start, start + count)]


def keys(count: int) -> list[str]:
    return [answer.key for answer in answers(0, count)]


def fill(folder: Path, units: int = 5, *, shard_rows: int = 6) -> None:
    with AnswerStore(folder, MADE_WITH, shard_rows=shard_rows) as store:
        for number in range(units):
            store.add(answers(3 * number, 3))


def test_answers_are_found_again_in_the_order_asked_for(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    with AnswerStore(tmp_path / "a", MADE_WITH) as store:
        assert len(store) == 15
        wanted = keys(15)[::-1]
        assert [row["key"] for row in store.read(wanted)] == wanted
        assert next(store.read(wanted))["text"] == "answer é\u2028 14"


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_file_cut_at_any_byte_keeps_its_whole_units_and_loses_no_other(tmp_path: Path, shard: int) -> None:
    """Whatever a kill leaves of the newest shard: no answer is torn, no unit is there in part."""
    fill(tmp_path / "a", 2 * shard + 1)
    path = tmp_path / "a" / "answers" / f"{shard:05}.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with AnswerStore(tmp_path / "a", MADE_WITH, shard_rows=6) as store:
            complete = sum(end <= length for end in ends) // 3 * 3
            assert len(store) == 6 * shard + complete
            assert path.read_bytes() == whole[: ends[complete - 1] if complete else 0]


def test_a_damaged_shard_is_named_put_aside_and_its_answers_are_wanted_again(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    path = tmp_path / "a" / "answers" / "00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"answer", b"ansver", 1))
    with AnswerStore(tmp_path / "a", MADE_WITH, shard_rows=6) as store:
        assert store.damaged == [str(path)]
        assert [key in store for key in keys(15)] == [True] * 6 + [False] * 6 + [True] * 3
        store.add(answers(6, 3))
        store.add(answers(9, 3))
    (tmp_path / "a" / "answers" / "00000.jsonl").unlink()
    with AnswerStore(tmp_path / "a", MADE_WITH, shard_rows=6) as store:
        assert len(store.damaged) == 1
        assert [key in store for key in keys(15)] == [False] * 6 + [True] * 9


def test_a_changed_setting_is_refused_by_its_name(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    with pytest.raises(RunFolderError, match="made with temperature 0.7, not 0.9; give another --output-dir"):
        AnswerStore(tmp_path / "a", {**MADE_WITH, "temperature": 0.9})


def test_a_folder_with_other_things_in_it_is_refused_and_one_that_a_kill_began_is_not(tmp_path: Path) -> None:
    (tmp_path / "a" / "answers").mkdir(parents=True)
    (tmp_path / "a" / ".lock").touch()
    fill(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        AnswerStore(tmp_path / "b", MADE_WITH)
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        AnswerStore(tmp_path / "a", MADE_WITH)


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "a", MADE_WITH), pytest.raises(RunFolderError, match="another process"):
        AnswerStore(tmp_path / "a", MADE_WITH).__enter__()


def test_each_sealed_shard_stands_in_the_manifest_with_its_rows_and_checksum(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    shards = json.loads((tmp_path / "a" / "manifest.json").read_text())["shards"]
    assert [(name, shard["rows"], len(shard["sha256"])) for name, shard in shards.items()] == [
        ("00000.jsonl", 6, 64),
        ("00001.jsonl", 6, 64),
    ]
