"""Data that cannot be learned as they are: one line with file, row and what to do, status 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_model, toy_tokenizer
from potstill.cli import main

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def turns(**answer: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ANSWER, **answer}]}


def call(**function: Any) -> dict[str, Any]:
    return turns(tool_calls=[{"function": function}])


BAD: list[tuple[Any, str]] = [
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "has chosen: preference data"),
    ({"prompt": "a", "completion": "b", "rejected": "c"}, "has rejected: preference data"),
    ({"prompt": "a", "completion": "b", "label": False}, "has label"),
    ({**turns(), "images": ["a.png"]}, "has images: not text"),
    ({**turns(), "audio": "a.wav"}, "has audio: not text"),
    ({"input_ids": [1, 2], "labels": [1, 2]}, "already tokenized"),
    ({**turns(), "tools": "{"}, "tools: must be JSON"),
    ({**turns(), "tools": [1]}, "tools must be a list of JSON schemas"),
    ({**turns(), "tools": {"name": "f"}}, "tools must be a list"),
    ({"text": "t", "tools": [{"name": "f"}]}, "tools and system need messages"),
    ({"text": "t", "system": "s"}, "tools and system need messages"),
    ({**turns(), "system": 3}, "system must be text"),
    (
        {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "t"},
        "without a system turn",
    ),
    (turns(weight=0.5), "its weight is 0.5"),
    (turns(weight="0"), "its weight is '0'"),
    (turns(train="no"), "its weight is 'no'"),
    (turns(train_detail=[{"begin_offset": 0}]), "train_detail is not supported"),
    ({"messages": [{**USER, "train": True}, ANSWER]}, "only turns of the assistant can be learned"),
    (turns(content=None), "message 2 has no content"),
    (turns(content=3), "message 2 has content of type int"),
    (turns(content={"text": "b"}), "message 2 has content of type dict"),
    (turns(content=[]), "message 2 has content of type list"),
    (turns(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "'image_url'"),
    (turns(content=[{"type": "text"}]), "message 2 has a part of type 'text'"),
    (turns(content=[3]), "message 2 has a part of type"),
    (turns(images=["x"]), "message 2 has images"),
    (turns(reasoning_content=3), "its reasoning must be text"),
    (turns(tool_calls="f()"), "tool_calls must be a list"),
    (turns(tool_calls=["f()"]), "tool_calls must be a list"),
    (call(), "needs the name of its function"),
    (call(name=3), "needs the name of its function"),
    (call(name="f", arguments="{"), "the arguments of f: must be JSON"),
    (call(name="f", arguments={}), "loses the tool call in turn 2 (f)"),
    ({**turns(), "tools": [{"name": "f"}]}, "does not write the tools of a conversation (f)"),
    ({"messages": [{"role": 3, "content": "a"}, ANSWER]}, "message 1 needs a role"),
    ({"messages": [{"content": "a"}, ANSWER]}, "message 1 needs a role"),
    ({"messages": ["a", "b"]}, "message 1 needs a role"),
    ({"messages": "a"}, "messages must be a list"),
    ({"messages": {"role": "user"}}, "messages must be a list"),
    ({"messages": [USER]}, "no assistant turn to learn from"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "conversations; needs"),
    ({"conversations": [{"from": "wizard", "value": "a"}]}, "has 'wizard'"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "has no content"),
    ({"conversations": "a"}, "conversations must be a list"),
    ({"conversations": [{"from": "function_call", "value": "f"}]}, "a function call: must be JSON"),
    ({"prompt": 3, "completion": "b"}, "prompt must be text or a list of messages"),
    ({"prompt": "a", "completion": 3}, "completion must be text or a list"),
    ({"prompt": [USER], "completion": [USER, ANSWER]}, "completion begins with a turn of the user"),
    ({"prompt": [], "completion": []}, "messages must be"),
    ({"prompt": "a"}, "let the teacher answer first"),
    ({"instruction": "a"}, "let the teacher answer first"),
    ({"instruction": "a", "output": 3}, "content of type int"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "history must be a list"),
    ({"question": "a", "answer": "b"}, "try --columns prompt=question,completion=answer"),
    ({}, "has no keys"),
    ({**turns(), "cut_off": "no"}, "cut_off must be true or false"),
    ({**turns(), "teacher_ids": "1 2"}, "teacher_ids must be a list of token ids"),
    ({**turns(), "teacher_ids": [1.5]}, "teacher_ids must be a list of token ids"),
    ({**turns(), "teacher_ids": [-1]}, "teacher_ids must be a list of token ids"),
    ({**turns(), "sampling": {"temperature": "warm"}}, "sampling must be an object"),
    ({**turns(), "sampling": "greedy"}, "sampling must be an object"),
    ({**turns(), "reference": ["b"]}, "reference must be an answer as text"),
    ('{"text": "\\ud800"}', "half of a surrogate pair ('\\ud800')"),
    ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ('{"text": NaN', "not JSON"),
    ("'text'", "not JSON"),
    ('"text"', "a JSON str"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its one line."""
    status = main(arguments)
    errors = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in errors
    assert errors.count("potstill: ") == 1
    return errors[errors.index("potstill: ") :].rstrip("\n")


@pytest.mark.parametrize(("row", "says"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_with_its_line_and_nothing_is_written(
    row: Any, says: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "a.jsonl", tmp_path / "run"
    text = row if isinstance(row, str) else json.dumps(row)
    file.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n" + text + "\n")
    flags = ["--data", str(file), "--output-dir", str(output), "--device", "cpu"]
    line = refused(["distill", str(models), str(models), *flags, "--precision", "fp32"], capsys)
    assert "\n" not in line
    assert says in line
    assert f"{file}:2" in line
    assert not output.exists()


FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ("a.jsonl.zst", b"not zstd", "cannot be read"),
    ("a.json", b"{", "not JSON"),
    ("a.json", b'{"a": 1, "b": 2}', "needs messages"),
    ("a.json", b"[1, 2]", "not a list of objects"),
    ("a.json", b"[]", "no conversation"),
    ("a.jsonl", b"", "no conversation"),
    ("a.jsonl", "é".encode("latin-1"), "not UTF-8"),
    ("a.jsonl", '{"text": "t"}\n'.encode("utf-16"), "not UTF-8"),
    ("a.csv", b"", "cannot be opened as data"),
    ("a.parquet", b"not parquet", "cannot be opened as data"),
]


@pytest.mark.parametrize(("name", "content", "says"), FILES, ids=range(len(FILES)))
def test_a_bad_file_is_named(
    name: str,
    content: bytes,
    says: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content)
    line = refused(["data", str(tmp_path / name), str(models)], capsys)
    assert says in line
    assert str(tmp_path / name) in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--columns", "prompt"], "needs NEW=OLD pairs"),
        (["--columns", "prompt=nothing"], "no column 'nothing'"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--chat-template", "none.jinja"], "none.jinja: no such chat template"),
        (["--split"], "--split"),
        (["--split", "test"], "a file has no split 'test'"),
        (["--data-name", "en"], "a file has no configuration 'en'"),
    ],
)
def test_bad_settings_for_reading_are_named(
    flags: list[str],
    says: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(turns()))
    assert says in refused(["data", str(file), str(models), *flags], capsys)


def test_a_template_file_wins_over_the_tokenizers_own(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, template = tmp_path / "a.jsonl", tmp_path / "t.jinja"
    file.write_text(json.dumps(turns()))
    each = "[{{ m.role }}]{{ m.content }}{{ eos_token }}"
    template.write_text(f"{{% for m in messages %}}{each}{{% endfor %}}")
    assert main(["data", str(file), str(models), "--chat-template", str(template)]) == 0
    assert "[user]a<|im_end|>⟦[assistant]b<|im_end|>⟧" in capsys.readouterr().out
    assert main(["data", str(file), str(models), "--chat-template", "plain"]) == 0
    assert "<|im_start|>assistant\n⟦b<|im_end|>⟧" in capsys.readouterr().out
