"""Whole runs that train a LoRA adapter: its files, interrupts, one copy of equal models."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import conversations, write_rows
from potstill import cli, load_model
from potstill.models.lora import with_lora, without_adapter
from test_distillation import FSDP, SHARDED, in_two_processes

pytest.importorskip("peft")
FAST = shlex.split("--device cpu --precision fp32 --learning-rate 0.03 --lora 4")


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make a teacher, a student and data."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    return pair_folder


def distill(
    *more: str, teacher: str = "teacher", output: str = "run", data: str = "data.jsonl"
) -> int:
    command = ["distill", teacher, "student", "--data", data, "--output-dir", output]
    return cli.main([*command, *FAST, *more])


def adapter(run: str = "run") -> dict[str, torch.Tensor]:
    return load_file(Path(run, "student", "adapter_model.safetensors"))


def losses(run: str = "run") -> list[float]:
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def assert_same(one: str, other: str, **tolerance: float) -> None:
    assert adapter(one).keys() == adapter(other).keys()
    for name, weight in adapter(one).items():
        torch.testing.assert_close(adapter(other)[name], weight, **tolerance)  # type: ignore[arg-type]


def test_a_run_saves_the_adapter_alone_and_can_be_opened_and_merged(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--max-steps", "8") == 0
    printed = capsys.readouterr().out
    assert "parameters are trained" in printed
    evaluation = json.loads((place / "run" / "evaluation.json").read_text())
    before, after = (evaluation[name]["kl_nats_per_token"] for name in ("before", "after"))
    assert after < before
    student = place / "run" / "student"
    assert not (student / "model.safetensors").exists()
    settings = json.loads((student / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == str((place / "student").resolve())
    assert all("lora_" in name and "lm_head" not in name for name in adapter())
    assert cli.main(["student", str(student), "--keep-layers", "all", "--output-dir", "whole"]) == 0
    merged, _ = load_model("whole", device="cpu")
    opened, _ = load_model(student, device="cpu")
    weights = dict(opened.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in merged.named_parameters())
    base = load_file(place / "student" / "model.safetensors")
    changed = {name for name, weight in weights.items() if not torch.equal(base[name], weight)}
    assert changed == {name for name in weights if name.endswith("_proj.weight")}


@pytest.mark.parametrize("teacher", ["teacher", "student"])
def test_an_interrupted_run_ends_with_the_same_adapter(
    place: Path, interrupt_at: Any, teacher: str
) -> None:
    more = shlex.split("--max-steps 8 --hard-label-weight 0.5")
    assert distill(*more, teacher=teacher, output="whole") == 0
    with interrupt_at(5):
        assert distill(*more, teacher=teacher) == 130
    assert distill(*more, teacher=teacher) == 0
    assert_same("whole", "run", rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("more", ["", "--on-policy 1 --rollout-tokens 4 --rollout-reuse 2"])
def test_a_teacher_that_is_the_students_base_is_one_copy_and_trains_the_same(
    place: Path, more: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "other").symlink_to((place / "student").resolve())
    settings = shlex.split(f"--max-steps 4 --hard-label-weight 0.5 --batch-size 2 {more}")
    settings += ["--precision", precision]
    assert distill(*settings, teacher="student") == 0
    assert "one copy of the weights" in capsys.readouterr().out
    assert distill(*settings, teacher="other", output="two") == 0
    assert "one copy" not in capsys.readouterr().out
    assert_same("run", "two", rtol=0, atol=0)
    assert losses() == losses("two")


@pytest.mark.parametrize("method", ["text", "cross"])
def test_other_methods(place: Path, method: str) -> None:
    assert distill("--max-steps", "8", "--method", method) == 0
    assert losses()[-1] < losses()[0]


def test_an_adapter_can_be_trained_on_an_adapter_and_its_run_measured_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--max-steps", "4") == 0
    first = str(place / "run" / "student")
    again = ["distill", "teacher", first, "--data", "data.jsonl", "--output-dir", "second", *FAST]
    assert cli.main([*again, "--max-steps", "4"]) == 0
    measured = [
        json.loads(Path(run, "evaluation.json").read_text())[name]["kl_nats_per_token"]
        for run, name in (("run", "after"), ("second", "before"), ("second", "after"))
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert measured[2] < measured[1]
    capsys.readouterr()
    evaluate = shlex.split("--teacher teacher --data data.jsonl --device cpu --precision fp32")
    assert cli.main(["evaluate", "second/student", *evaluate, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert cli.main(["compare", "run", "second", "--output-dir", "compared"]) in (0, 2)
    assert distill("--max-steps", "4", "--lora-alpha", "1") == 2
    assert "holds a run with lora_alpha None, not 1.0" in capsys.readouterr().err


def test_activation_checkpointing_trains_the_same_adapter(place: Path) -> None:
    """The embedding's output needs no gradient here, and the layers still must give theirs."""
    assert distill("--max-steps", "4") == 0
    assert distill("--max-steps", "4", "--activation-checkpointing", output="again") == 0
    assert_same("run", "again", rtol=1e-4, atol=1e-6)


def test_a_student_begins_as_its_teacher(place: Path) -> None:
    assert distill("--max-steps", "1", teacher="student") == 0
    assert abs(losses()[0]) < 1e-6


def test_without_its_adapter_a_model_in_training_is_its_base(tmp_path: Path) -> None:
    from conftest import tiny_model

    base = tiny_model(layers=2)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    model = with_lora(base, 2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.train()
    with torch.no_grad(), without_adapter(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert model.training
    assert all("lora_" in name for name, one in model.named_parameters() if one.requires_grad)
    assert not torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-m potstill", str(FSDP)], ids=["DDP", "FSDP 2"])
def test_two_processes_train_the_same_adapter_as_one(place: Path, program: str) -> None:
    """FSDP opens a teacher of its own; DDP uses the student's base."""
    (place / "fsdp.yaml").write_text(SHARDED)
    write_rows(place / "train.jsonl", conversations(24))
    data = shlex.split("--data train.jsonl --eval-data data.jsonl --max-steps 4")
    command = ["distill", "student", "student", *data, *FAST, "--hard-label-weight", "0.5"]
    config = ["--config", "fsdp.yaml"] if program == str(FSDP) else []
    two = [*command, *config, "--batch-size", "2", "--output-dir", "two"]
    done = in_two_processes(*two, program=program)
    assert done.returncode == 0, done.stderr
    assert ("one copy" in done.stdout) == (not config)
    assert cli.main([*command, "--batch-size", "4", "--output-dir", "one"]) == 0
    assert_same("one", "two", rtol=1e-3, atol=1e-5)
