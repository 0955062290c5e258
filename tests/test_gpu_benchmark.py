"""The benchmark for GPUs can be run, here with small sizes on a CPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_benchmark_prints_tables_and_writes_json(tmp_path: Path) -> None:
    options = shlex.split("--device cpu --tokens 16 --shrink 64 --rounds 1 --output gpu.json")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| potstill |") == 4
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tokens"] == 16
    assert set(found["Qwen 2.5 7B → 1.5B, forward_kl"]) >= {"floor", "potstill"}
