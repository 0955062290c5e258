"""The forms and files in which people have their data are read as they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from potstill.data import read_conversations, read_prompts
from potstill.errors import ConfigError, DataError
from potstill.reading import Reading

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
TURNS = [USER, ANSWER]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path | str, **reading: Any) -> list[dict[str, Any]]:
    return list(read_conversations(path, reading=Reading(**reading)))


FORMS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("openai", {"messages": TURNS}, TURNS),
    ("trl text", {"prompt": "a", "completion": "b"}, TURNS),
    ("trl lists", {"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, *TURNS]),
    ("system beside a prompt", {"system": "s", "prompt": "a", "completion": "b"}, [SYSTEM, *TURNS]),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, TURNS),
    (
        "alpaca with input",
        {"instruction": "i", "input": "x", "output": "b"},
        [{"role": "user", "content": "i\n\nx"}, ANSWER],
    ),
    (
        "alpaca with history",
        {"instruction": "a", "output": "b", "history": [["a", "b"]], "system": "s"},
        [SYSTEM, *TURNS, *TURNS],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [SYSTEM, *TURNS],
    ),
    (
        "sharegpt with a function call",
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "r"},
            ANSWER,
        ],
    ),
    ("conversations with roles", {"conversations": TURNS}, TURNS),
    (
        "parts",
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
        TURNS,
    ),
    ("developer", {"messages": [{"role": "developer", "content": "s"}, *TURNS]}, [SYSTEM, *TURNS]),
    ("null keys", {"messages": [{**USER, "tool_calls": None}, {**ANSWER, "name": None}]}, TURNS),
    (
        "a call in the old form",
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                {"role": "function", "name": "f", "content": "r"},
                ANSWER,
            ]
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "name": "f"},
            ANSWER,
        ],
    ),
    (
        "a thought beside the answer",
        {"messages": [USER, {**ANSWER, "reasoning": "hm"}]},
        [USER, {**ANSWER, "reasoning_content": "hm"}],
    ),
    ("weight 1", {"messages": [USER, {**ANSWER, "weight": 1}]}, TURNS),
    ("train true", {"messages": [USER, {**ANSWER, "train": True}]}, TURNS),
    (
        "weight 0 and train false",
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "train": False}]},
        [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 0}],
    ),
    ("the assistant first", {"messages": [ANSWER, *TURNS]}, [ANSWER, *TURNS]),
    ("a question at the end", {"messages": [*TURNS, USER]}, TURNS),
]


@pytest.mark.parametrize(("row", "messages"), [one[1:] for one in FORMS], ids=[f[0] for f in FORMS])
def test_each_form_becomes_messages(
    tmp_path: Path, row: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    assert read(lines(tmp_path / "a.jsonl", row)) == [{"messages": messages}]


def test_tools_are_kept_as_a_list_or_as_json_text(tmp_path: Path) -> None:
    for tools in ([TOOL], json.dumps([TOOL])):
        row = {"messages": TURNS, "tools": tools}
        assert read(lines(tmp_path / "a.jsonl", row)) == [{"messages": TURNS, "tools": [TOOL]}]
    assert read(lines(tmp_path / "a.jsonl", {"messages": TURNS, "tools": []})) == [
        {"messages": TURNS}
    ]


def test_columns_are_renamed_and_win_over_other_forms(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"question": "a", "answer": "b", "text": "t"})
    assert read(file, columns="prompt=question, completion=answer") == [{"messages": TURNS}]
    preferred = lines(tmp_path / "b.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert read(preferred, columns="prompt=prompt,completion=chosen") == [{"messages": TURNS}]
    with pytest.raises(DataError, match=r"b\.jsonl:1: no column 'q' \(--columns\); it has chosen"):
        read(preferred, columns="prompt=q")
    with pytest.raises(ConfigError, match="needs NEW=OLD pairs"):
        read(preferred, columns="prompt")


def test_the_system_prompt_is_merged_into_the_first_question(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"messages": [SYSTEM, *TURNS]}, {"messages": TURNS})
    merged = [{"role": "user", "content": "s\n\na"}, ANSWER]
    assert read(file, merge_system=True) == [{"messages": merged}, {"messages": TURNS}]
    prompts = read_prompts(file, reading=Reading(merge_system=True))
    assert [row["messages"] for row in prompts] == [merged[:1], TURNS[:1]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_are_read_from_files_of_many_names(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(mark + json.dumps({"messages": TURNS}) + "\r\n\r\n")
    assert read(tmp_path / name) == [{"messages": TURNS}]


@pytest.mark.parametrize("form", ["[\n{}, {}]", '{"data":\n[{}, {}]}', "[{},\n {}]"])
def test_a_json_list_is_read(tmp_path: Path, form: str) -> None:
    text = form.replace("{}", '{"text": "t"}', 1).replace("{}", '{"text": "u"}')
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == [{"text": "t"}, {"text": "u"}]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    import pyarrow

    data = (json.dumps({"messages": TURNS}) + "\n").encode() * 3
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(data)
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        file.write(json.dumps([{"messages": TURNS}] * 3).encode())
    with pyarrow.output_stream(tmp_path / "a.jsonl.zst", compression="zstd") as stream:
        stream.write(data)
    for name in ("a.jsonl.gz", "a.json.gz", "a.jsonl.zst"):
        assert read(tmp_path / name) == [{"messages": TURNS}] * 3


def test_several_files_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        lines(tmp_path / f"{name}.jsonl", {"text": name})
    texts = [row["text"] for row in read(f"{tmp_path}/*.jsonl")]
    assert texts == ["a", "b", "c"]
    both = read(f"{tmp_path}/c.jsonl, {tmp_path}/a.jsonl")
    assert [row["text"] for row in both] == ["c", "a"]
    odd = lines(tmp_path / "a,b.jsonl", {"text": "odd"})
    assert read(odd) == [{"text": "odd"}]
    with pytest.raises(DataError, match=r"no file has such a name"):
        read(f"{tmp_path}/*.csv")


def test_any_split_of_a_saved_data_set_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train_sft", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", split="train_sft") == [{"text": "train_sft"}]
    with pytest.raises(DataError, match="--split"):
        read(tmp_path / "saved", split="train")
    folder = tmp_path / "folder"
    folder.mkdir()
    splits["test"].to_parquet(str(folder / "test.parquet"))
    assert read(folder, split="test") == [{"text": "test"}]


def test_null_keys_that_arrow_adds_to_tool_calls_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": 2}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "b", "tool_calls": [one]}]}
        for one in (CALL, other)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    found = [row["messages"][1]["tool_calls"][0] for row in read(tmp_path / "a.parquet")]
    assert found == [CALL, other]


def test_a_refusal_shows_the_keys_and_the_nearest_form(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"question": "a", "answer": "b", "id": 3})
    with pytest.raises(DataError) as caught:
        read(file)
    assert str(caught.value) == (
        f"{file}:1: has answer, id, question; needs messages, conversations, instruction and "
        "output, prompt and completion, or text (rename columns with --columns); try --columns "
        "prompt=question,completion=answer"
    )


def test_prompts_are_read_in_the_same_forms(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl",
        {"prompt": "a"},
        {"prompt": [USER]},
        {"instruction": "a"},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"messages": TURNS, "tools": [TOOL]},
    )
    rows = list(read_prompts(file))
    assert [row["messages"] for row in rows] == [[USER]] * 5
    assert rows[4]["tools"] == [TOOL]
