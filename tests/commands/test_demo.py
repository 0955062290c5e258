"""The demo on the real model, with a short budget and an interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_survives_a_kill_in_its_first_stage_and_ends_with_a_better_student(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "potstill", "demo", "--output-dir", "demo", "--seconds", "40"]
    answers = tmp_path / "demo" / "data" / "train" / "answers" / "00000.jsonl"
    first = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while first.poll() is None and not (answers.is_file() and answers.stat().st_size):
        time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = answers.read_bytes()
    assert kept
    subprocess.run(command, cwd=tmp_path, check=True, timeout=1500)
    assert answers.read_bytes().startswith(kept[: kept.rindex(b'"more": 0}\n')])
    evaluation = json.loads((tmp_path / "demo" / "evaluation.json").read_text())
    assert (
        evaluation["after"]["kl_nats_per_token"] < 0.9 * evaluation["before"]["kl_nats_per_token"]
    )
    assert (tmp_path / "demo" / "report.html").is_file()
