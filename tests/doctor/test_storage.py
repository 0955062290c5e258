"""The estimate of a captured and of a served teacher, against real files and real traffic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import conversations, toy_tokenizer, write_rows
from models.quantized_folders import write_model
from potstill import cli
from potstill.data import BatchLayout, encode_conversation
from potstill.doctor.cost import ModelSize, Plan
from potstill.doctor.examination import examine
from potstill.doctor.storage import storage
from potstill.doctor.text import as_text
from potstill.losses import Head
from potstill.models import ModelOpener
from potstill.teachers import LocalTeacher, ServedTeacher


@pytest.mark.parametrize("keep", ["states", "states8"])
def test_a_captures_shards_are_as_large_as_planned(tmp_path: Path, keep: str) -> None:
    write_model(tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    write_rows(data, conversations(60))
    found = examine(str(tmp_path / "teacher"), str(tmp_path / "teacher"), data=str(data))
    assert found.storage is not None
    command = ["capture", str(tmp_path / "teacher"), "--data", str(data), "--keep", keep]
    assert cli.main([*command, "--output-dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    # Beside the states, a shard has 24 bytes a conversation and a header.
    more = 24 * manifest["conversations"] + 500
    assert found.storage.captured_bytes[keep] == pytest.approx(manifest["bytes"] - more, abs=500)
    head = (tmp_path / "out/head.safetensors").stat().st_size
    if keep == "states":
        assert found.storage.head_bytes == pytest.approx(head, rel=0.01)


def test_a_step_of_a_served_teacher_sends_as_much_as_planned(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "teacher")
    rows = [encode_conversation(one, toy_tokenizer()) for one in conversations(8)]
    batch = BatchLayout(265)(rows)
    served = ServedTeacher.__new__(ServedTeacher)
    served.facts = {"reads_packed": True, "embedding_rows": 288}
    request = len(served._request_body(batch))
    target = LocalTeacher(ModelOpener(device="cpu", dtype="bfloat16").model(folder)).targets(batch)
    assert isinstance(target.head, Head)
    reply = 2 * target.hidden.numel()
    count = len(target.hidden)
    tokens = batch["input_ids"].numel()  # with padding, which the plan does not count
    size = ModelSize(0, 0, len(target.head), 64, 4, 64, 0)
    plan = Plan(1, 8, tokens / 8, count / 8, tokens / 8, count / 8, tokens)
    found = storage("logits", size, plan, 8)
    assert found is not None
    assert found.served_bytes_a_step == pytest.approx(request + reply, rel=0.1)
    assert found.captured_bytes["states"] == reply


def test_text_needs_no_teacher_and_cross_no_sparse_capture(tmp_path: Path) -> None:
    size, plan = ModelSize(0, 0, 10, 4, 1, 4, 0), Plan(1, 1, 1, 1, 1, 1, 1)
    assert storage("text", size, plan, 5) is None
    crossed = storage("cross", size, plan, 5)
    assert crossed is not None
    assert set(crossed.captured_bytes) == {"states", "states8"}


def test_the_page_shows_it(tmp_path: Path) -> None:
    write_model(tmp_path / "teacher")
    page = as_text(examine(str(tmp_path / "teacher"), str(tmp_path / "teacher")))
    assert "captured  all conversations take states 129 MB, states8 69 MB, sparse 33 MB" in page
    assert "of traffic a step (potstill serve)" in page
