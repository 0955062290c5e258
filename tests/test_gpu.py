"""Runs on a GPU. Skipped without one, with the tests of tests/losses/ that then run there too."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import conversations, write_rows
from potstill import cli

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = shlex.split("--device cuda --precision bf16 --learning-rate 0.01 --max-steps 6")


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make a teacher, a student and data."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    return pair_folder


def distill(*more: str, output: str = "run") -> int:
    command = ["distill", "teacher", "student", "--data", "data.jsonl", "--output-dir", output]
    return cli.main([*command, *ON_GPU, *more])


def losses(run: str) -> list[float]:
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run, "student", "model.safetensors"))


@pytest.mark.parametrize("method", ["logits", "cross", "text"])
def test_a_student_learns(place: Path, method: str) -> None:
    assert distill("--method", method) == 0
    evaluation = json.loads(Path("run/evaluation.json").read_text())
    name = "nll_nats_per_token" if method == "text" else "kl_nats_per_token"
    assert evaluation["after"][name] < evaluation["before"][name]


@pytest.mark.parametrize(
    "more", ["", "--hard-label-weight 0.5", "--divergence jensen_shannon --temperature 2"]
)
def test_the_losses_of_a_run_are_those_without_kernels(
    place: Path, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for choice in ("auto", "off"):
        monkeypatch.setenv("POTSTILL_KERNELS", choice)
        assert distill(*shlex.split(more), output=choice) == 0
    assert losses("auto") == pytest.approx(losses("off"), rel=2e-2)
    assert losses("auto")[0] == pytest.approx(losses("off")[0], rel=1e-3)


def test_an_interrupted_run_ends_with_the_same_weights(place: Path, interrupt_at: Any) -> None:
    assert distill(output="whole") == 0
    with interrupt_at(4):
        assert distill() == 130
    assert distill() == 0
    for name, weight in weights("whole").items():
        torch.testing.assert_close(weights("run")[name], weight, rtol=1e-3, atol=1e-5)


def test_on_policy_and_lora(place: Path) -> None:
    pytest.importorskip("peft")
    more = "--on-policy 0.5 --rollout-tokens 8 --batch-size 2 --lora 4"
    assert distill(*shlex.split(more)) == 0
