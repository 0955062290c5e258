"""Bad input and failures of the command line: one line of error, and nothing left behind."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import conversations, toy_tokenizer, write_rows
from potstill import cli
from potstill.distillation import training as training_stage
from potstill.training.trainer import DistillationTrainer

PAIR = "distill teacher student --output-dir run --max-steps 2"
DISTILL = f"{PAIR} --data data.jsonl"
FAST = f"{DISTILL} --device cpu --precision fp32 --learning-rate 0.01"
BAD_INPUT = {
    "missing data": (f"{PAIR} --data none.jsonl", "none.jsonl: cannot be read"),
    "broken row": (f"{PAIR} --data broken.jsonl", "broken.jsonl:2: not JSON"),
    "prompts only": (f"{PAIR} --data prompts.jsonl", "let the teacher answer first"),
    "nothing fits": (f"{PAIR} --data long.jsonl --max-length 20", "nothing to learn"),
    "one conversation": (f"{PAIR} --data one.jsonl", "no conversation is left to hold out"),
    "no template": (DISTILL.replace("student", "bare"), "--chat-template plain"),
    "no such layer": ("student teacher --output-dir run --keep-layers 0,9", "numbered 0 to 3"),
    "layers not numbers": (
        "student teacher --output-dir run --keep-layers some",
        "give a number (8), a list (0,1,5,9), half or all",
    ),
    "attention not installed": (f"{DISTILL} --attention flash_attention_3", "install its package"),
    "unknown attention": (f"{DISTILL} --attention quick", "attention quick: student cannot be"),
    "flash in float32": (f"{DISTILL} --precision fp32 --attention flash_attention_2", "in 16 bits"),
    "LoRA of rank 0": (f"{DISTILL} --lora 0", "lora 0: a rank, so at least 1"),
    "LoRA with alpha 0": (f"{DISTILL} --lora 4 --lora-alpha 0", "lora_alpha 0: must be above 0"),
    "alpha alone": (f"{DISTILL} --lora-alpha 8", "give --lora RANK"),
    "unknown key": ("distill --config bad.yaml", "did you mean learning_rate?"),
    "unknown flag": (f"{DISTILL} --lerning-rate 1", "did you mean --learning-rate?"),
    "unknown command": ("destill", "did you mean distill?"),
    "missing flag": ("distill teacher student", "needs --data, --output-dir"),
    "wrong type": (f"{DISTILL} --learning-rate fast", "learning"),
    "unknown trainer setting": (
        f"""{DISTILL} --trainer '{{"optimiser": "sgd"}}'""",
        "trainer.optimiser",
    ),
    "bad trainer setting": (
        f"""{DISTILL} --trainer '{{"save_strategy": "never"}}'""",
        "check save_strategy",
    ),
    "unknown method": (f"{DISTILL} --method osmosis", "osmosis"),
    "unknown alignment": (
        f"{DISTILL} --method cross --alignment stars",
        "alignment 'stars' is not known; use one of pieces, cells, push_forward",
    ),
    "unknown precision": (f"{DISTILL} --precision fp12", "fp12"),
    "absent model": (DISTILL.replace("teacher", "absent/model"), "not in the hub's cache"),
    "folder not empty": (
        "distill teacher student --output-dir full --data data.jsonl",
        "full: not empty",
    ),
    "not a run": ("report full", "full"),
}
"""By name: a command that cannot work, and a part of its error message."""


def potstill(command: str) -> int:
    return cli.main(shlex.split(command))


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make a teacher, a student and data."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    return pair_folder


@pytest.fixture
def bad_files(place: Path) -> Path:
    """Add the files that `BAD_INPUT` names; the student ``bare`` has no chat template."""
    write_rows(place / "prompts.jsonl", [{"prompt": "x"}])
    write_rows(
        place / "long.jsonl", [{"prompt": f"{i} rain " * 50, "completion": "on"} for i in range(3)]
    )
    write_rows(place / "one.jsonl", conversations(1))
    (place / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (place / "bad.yaml").write_text("lerning_rate: 1\n")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("mine")
    (place / "bare").mkdir()
    for file in (place / "student").iterdir():
        (place / "bare" / file.name).write_bytes(file.read_bytes())
    for file in (place / "bare").glob("*.jinja"):
        file.unlink()
    toy_tokenizer(chat_template=None).save_pretrained(place / "bare")
    return place


@pytest.mark.parametrize(("command", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    bad_files: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    before = sorted(bad_files.rglob("*"))
    assert potstill(command) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("potstill:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error
    assert sorted(bad_files.rglob("*")) == before


@pytest.mark.parametrize(
    "flag",
    [
        "--batch-size",
        "--max-steps",
        "--seconds",
        "--gradient-accumulation-steps",
        "--max-length",
        "--eval-steps",
    ],
)
def test_zero_is_refused_where_a_number_must_be_positive(
    place: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = FAST.replace(" --max-steps 2", "")
    assert potstill(f"{command} {flag} 0") == 2
    assert "must be above 0" in capsys.readouterr().err


def test_an_eval_strategy_is_refused_and_eval_steps_recommended(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = FAST.replace(" --max-steps 2", "")
    assert potstill(f"""{command} --trainer '{{"eval_strategy": "steps"}}'""") == 2
    assert "give eval_steps instead" in capsys.readouterr().err


def test_a_started_run_refuses_another_setting_and_names_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert potstill(FAST) == 0
    assert potstill(f"{FAST} --temperature 2") == 2
    assert "holds a run with temperature 1.0, not 2.0" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_no_student(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "run/student/model.safetensors")

    monkeypatch.setattr(training_stage, "save_student", full)
    assert potstill(FAST) == 2
    assert "run/student/model.safetensors: No space left on device" in capsys.readouterr().err
    assert not (place / "run" / "student").exists()
    assert not list((place / "run").glob("*unfinished*"))


def test_a_lack_of_gpu_memory_is_one_line_that_recommends_a_smaller_batch(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(DistillationTrainer, "training_step", full)
    assert potstill(FAST) == 2
    assert "lower --batch-size" in capsys.readouterr().err.splitlines()[-1]
