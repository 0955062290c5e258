"""A captured teacher: the same targets as the live one, from files that survive a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import conversations, toy_tokenizer, write_rows
from potstill import cli
from potstill.data import BatchLayout, encode_conversation
from potstill.errors import DataError, ModelError, RunFolderError
from potstill.losses import Head
from potstill.models import ModelOpener
from potstill.teachers import (
    CapturedTeacher,
    LocalTeacher,
    LossSettings,
    capture_conversations,
    capture_writer,
    open_teacher,
)
from potstill.teachers.captured import batch_keys, row_key

FLOAT = ModelOpener(device="cpu", dtype="float32")
KILLS = 30


@pytest.fixture
def teacher(model_folder: Callable[..., Path]) -> Path:
    return model_folder(seed=1)


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [encode_conversation(one, toy_tokenizer()) for one in conversations(count)]


def captured(teacher: Path, folder: Path, count: int = 12, **settings: Any) -> CapturedTeacher:
    settings = {"max_length": 512, "opener": FLOAT, "progress": False, **settings}
    capture_conversations(str(teacher), conversations(count), folder, **settings)
    return CapturedTeacher(folder, tokenizer=toy_tokenizer())


@pytest.mark.parametrize(
    "layout",
    [
        BatchLayout(265),
        BatchLayout(265, packed=False),
        BatchLayout(265, one_line=True),
        BatchLayout(265, packed=False, masked=False),
    ],
    ids=["packed", "padded", "one line", "unmasked"],
)
def test_loss_and_gradient_equal_the_live_teachers_in_any_layout(
    teacher: Path, tmp_path: Path, layout: BatchLayout
) -> None:
    stored = captured(teacher, tmp_path / "capture")
    live = LocalTeacher(FLOAT.model(teacher))
    batch = layout(rows()[::-1][:7])  # another order and a part of what was captured
    count = sum(int((row != -100).sum()) for row in batch["labels"][:, 1:])
    found = []
    for source in (stored, live):
        hidden = torch.randn(count, 32, generator=torch.Generator().manual_seed(0))
        weight = torch.randn(272, 32, generator=torch.Generator().manual_seed(1))
        hidden.requires_grad_(), weight.requires_grad_()
        labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
        for divergence in ("forward_kl", "reverse_kl"):
            settings = LossSettings(divergence=divergence, temperature=1.5)
            source.targets(batch).summed_loss(hidden, Head(weight), labels, settings).backward()
        found.append((hidden.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_states_in_8_bits_take_half_the_bytes_and_their_cost_is_measured(
    teacher: Path, tmp_path: Path
) -> None:
    bf16 = ModelOpener(device="cpu", dtype="bfloat16")
    exact = captured(teacher, tmp_path / "exact", opener=bf16)
    rounded = captured(teacher, tmp_path / "rounded", opener=bf16, keep="states8")
    sizes = [sum(s["tokens"] for s in one.manifest["shards"].values()) for one in (exact, rounded)]
    assert sizes[0] == sizes[1]
    batch = BatchLayout(265)(rows()[:5])
    states = [one.targets(batch).hidden.float() for one in (exact, rounded)]
    assert (states[0] - states[1]).abs().max() <= states[0].abs().max() / 100
    assert 0 < rounded.manifest["rounding_kl_nats"] < 1e-4


def test_a_key_covers_ids_and_supervised_positions_and_nothing_else() -> None:
    one, other = rows(2)
    assert row_key(one)[0] != row_key(other)[0]
    shifted = {**one, "labels": [-100] * 3 + one["labels"][3:]}
    last = max(i for i, label in enumerate(one["labels"]) if label != -100)
    unsupervised = {**one, "labels": [*one["labels"][:last], *[-100] * (len(one["labels"]) - last)]}
    assert row_key(one) == row_key(shifted)  # the prompt is not supervised anyway
    assert row_key(one)[0] != row_key(unsupervised)[0]
    for layout in (BatchLayout(265), BatchLayout(265, packed=False)):
        found = dict(batch_keys(layout(rows())))
        assert found == dict(map(row_key, rows()))


def test_what_was_not_captured_is_an_error_that_says_how_many_and_which(
    teacher: Path, tmp_path: Path
) -> None:
    stored = captured(teacher, tmp_path / "capture", count=8)
    stored.require(rows(8))
    with pytest.raises(DataError, match=r"4 of 12 conversations were not captured, first '.*\w"):
        stored.require(rows(12))
    with pytest.raises(DataError, match="was not captured"):
        stored.targets(BatchLayout(265)(rows(12)))


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_an_interrupted_capture_continues_and_ends_with_the_same_files(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.teachers.capture.SHARD_CONVERSATIONS", 3)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    captured(teacher, whole, count=11)
    write = capture_writer.CaptureWriter.write
    stop_at = [0]

    def killed(self: Any, shard: Any) -> None:
        if len(self.manifest.get("shards", ())) == stop_at[0]:
            raise KeyboardInterrupt
        write(self, shard)

    monkeypatch.setattr(capture_writer.CaptureWriter, "write", killed)
    for stop_at[0] in range(4):  # before the first shard, then after one, two and three
        with pytest.raises(KeyboardInterrupt):
            captured(teacher, resumed, count=11)
        (resumed / "shards").mkdir(exist_ok=True)
        (resumed / "shards" / ".half.unfinished").write_bytes(b"half")
    stop_at[0] = -1
    captured(teacher, resumed, count=11)
    assert files(whole) == files(resumed)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_named_and_captured_again(
    teacher: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "capture"
    captured(teacher, folder)
    (shard,) = (folder / "shards").iterdir()
    content = shard.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    shard.write_bytes({"cut": content[:-9], "flip": flipped, "gone": b""}[damage])
    if damage == "gone":
        shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name}: damaged .* run the same potstill"):
        CapturedTeacher(folder, tokenizer=toy_tokenizer()).require(rows())
    captured(teacher, folder)
    assert shard.name in capsys.readouterr().out
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": "states8"}, "keep states, not states8"),
        ({"max_length": 100}, "max_length 512, not 100"),
        (
            {"opener": ModelOpener(device="cpu", dtype="bfloat16")},
            "captured in float32, not bfloat16",
        ),
    ],
)
def test_a_folder_holds_one_teacher_and_one_way_of_reading(
    teacher: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    captured(teacher, tmp_path / "capture", count=4)
    before = files(tmp_path / "capture")
    with pytest.raises(RunFolderError, match=named):
        captured(teacher, tmp_path / "capture", **{"count": 12, **change})
    assert files(tmp_path / "capture") == before


def test_another_teacher_under_the_same_name_is_refused(
    teacher: Path, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    link = tmp_path / "teacher"
    link.symlink_to(teacher)
    captured(link, tmp_path / "capture", count=4)
    link.unlink()
    link.symlink_to(model_folder(seed=2))
    with pytest.raises(RunFolderError, match="captured from other weights of this teacher"):
        captured(link, tmp_path / "capture")


def test_doctor_says_that_a_capture_is_no_model(
    pair_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captured(Path("teacher"), Path("capture"), count=4)
    assert cli.main(["doctor", "capture", "student"]) == 2
    assert "capture: not a model in this process" in capsys.readouterr().err


def test_a_second_capture_adds_what_is_missing_and_opens_no_model_for_the_rest(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "capture"
    captured(teacher, folder, count=5)
    monkeypatch.setattr(ModelOpener, "model", None)
    assert len(captured(teacher, folder, count=5)) == 5
    monkeypatch.undo()
    assert len(captured(teacher, folder, count=9)) == 9


def test_a_teacher_that_overflows_is_refused_and_leaves_no_shard(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = LocalTeacher.targets

    def overflowing(self: Any, batch: Any) -> Any:
        found = targets(self, batch)
        found.hidden[0, 0] = torch.inf
        return found

    monkeypatch.setattr(LocalTeacher, "targets", overflowing)
    with pytest.raises(ModelError, match="not finite in float32; use --precision"):
        captured(teacher, tmp_path / "capture")
    assert not list((tmp_path / "capture" / "shards").iterdir())


def potstill(*arguments: str) -> int:
    return cli.main([*arguments, "--precision", "fp32", "--device", "cpu"])


def train(teacher: str, output: str, *flags: str) -> int:
    flags = ("--data", "data.jsonl", "--output-dir", output, "--max-steps", "4", *flags)
    return potstill("distill", teacher, "student", *flags)


@pytest.mark.parametrize("method", ["logits", "cross", "text"])
def test_a_student_of_a_capture_is_the_student_of_the_live_teacher(
    pair_folder: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("data.jsonl"), conversations(16))
    assert potstill("capture", "teacher", "--data", "data.jsonl", "--output-dir", "capture") == 0
    assert "16 captured now" in capsys.readouterr().out
    assert train("teacher", "live", "--method", method) == 0
    (pair_folder / "teacher").unlink()
    assert train("capture", "stored", "--method", method) == 0
    measured = [json.loads(Path(run, "evaluation.json").read_text()) for run in ("live", "stored")]
    for when in ("teacher", "before", "after"):
        for name in ("kl_nats_per_token", "bits_per_byte"):
            one, other = (run[when][name] for run in measured)
            assert one == pytest.approx(other, abs=1e-5)
    assert Path("stored/report.html").is_file()
    said = "text learns from the text alone" in capsys.readouterr().out
    assert said == (method == "text")


def test_the_model_behind_a_capture_captures_what_is_missing(pair_folder: Path) -> None:
    write_rows(Path("data.jsonl"), conversations(16))
    assert train("capture", "run", "--teacher-model", "teacher") == 0
    assert len(open_teacher("capture")) == 16  # type: ignore[arg-type]


def test_missing_conversations_stop_a_run_before_anything_is_written(
    pair_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("data.jsonl"), conversations(10))
    assert potstill("capture", "teacher", "--data", "data.jsonl", "--output-dir", "capture") == 0
    write_rows(Path("data.jsonl"), conversations(16))
    assert train("capture", "run") == 2
    assert "conversations were not captured" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"kind": "capture"}', "damaged or missing"),
        ('{"kind": "capture", "format": 99}', "format 99"),
    ],
)
def test_a_bad_manifest_is_one_line(
    pair_folder: Path, content: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("data.jsonl"), conversations(10))
    Path("capture").mkdir()
    Path("capture/manifest.json").write_text(content)
    assert train("capture", "run") == 2
    error = capsys.readouterr().err
    assert named in error or "tokenizer" in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_capture_that_is_killed_again_and_again_ends_with_the_same_files(
    teacher: Path, tmp_path: Path
) -> None:
    program = """
import sys
from conftest import conversations
from potstill.models import ModelOpener
from potstill.teachers import capture
capture.SHARD_CONVERSATIONS = 4
capture.capture_conversations(
    sys.argv[1], conversations(40), sys.argv[2], max_length=512, progress=False,
    opener=ModelOpener(device="cpu", dtype="float32"))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", program, str(teacher), str(folder)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    random, kills = np.random.default_rng(0), 0
    while (shards := len(list(killed.glob("shards/*.safetensors")))) < 10 and kills < KILLS:
        process = start(killed)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(killed.glob("shards/*"))) > shards:
                time.sleep(random.random() * 0.03)
                process.kill()
            time.sleep(0.001)
        process.wait()
        kills += 1
    assert kills > 3
    assert start(killed).wait() == 0
    assert files(whole) == files(killed)
