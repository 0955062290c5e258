"""The teaching scripts, each run as its first lines say, on the demo's models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
ACROSS = "distiller_llama32_3B_to_tinyllama_logits"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [path for path in EXAMPLES if path.stem != ACROSS], ids=lambda path: path.stem
)
def test_the_demo_brings_the_student_closer_to_its_teacher(script: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(script), "--demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    measured = re.findall(
        r"^(?:before|after): (?:KL|cross-entropy) ([\d.]+) nats", run.stdout, re.MULTILINE
    )
    before, after = map(float, measured)
    assert after < 0.7 * before


@pytest.mark.slow
def test_across_tokenizers_pieces_help_and_the_padded_last_token_does_not(tmp_path: Path) -> None:
    (script,) = (path for path in EXAMPLES if path.stem == ACROSS)
    run = subprocess.run(
        [sys.executable, str(script), "--demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    found = {
        name: float(bits)
        for name, bits in re.findall(r"^(\w+): ([\d.]+) bits per byte", run.stdout, re.MULTILINE)
    }
    assert found["pieces"] < 0.9 * found["before"]
    assert found["last_token_padded"] > found["pieces"]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_a_script_is_short_and_opens_with_the_command_that_runs_it(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert text.count("\n") < 82  # lines have 100 columns
    assert f"python examples/{script.name}" in text.split('"""')[1]
