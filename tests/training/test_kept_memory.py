"""On a CPU, freed memory is kept for the next step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from potstill.training.kept_memory import ENVIRONMENT, keep_freed_memory

FAULTS = """
import ctypes, resource, torch
from potstill.training.kept_memory import keep_freed_memory
assert keep_freed_memory() == {kept}
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 kB
begun = 0
for turn in range(10):
    torch.ones(2**24)
    begun = begun or resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""
glibc = pytest.mark.skipif(sys.platform != "linux", reason="glibc's")


def faults(kept: bool, environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", FAULTS.format(kept=kept)]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    )


@glibc
def test_a_reallocated_tensor_causes_no_page_faults() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    pages = 4 * 2**24 // 4096
    assert faults(True, environment) < 4 * pages
    assert faults(False, {**environment, "MALLOC_TRIM_THRESHOLD_": "131072"}) > 8 * pages


def test_settings_in_the_environment_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "131072")
        assert not keep_freed_memory()
        monkeypatch.delenv(name)


def test_other_systems_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
