"""The Triton kernels compiled for cards without one: registers, spills, width of loads.

Each is compiled in a process of its own, because the tests of this one interpret them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
PROGRAM = """
import json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from potstill.losses.kernels import rows

architecture, requests = int(sys.argv[1]), json.loads(sys.argv[2])
ptxas = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
for name, constants in requests:
    kernel = getattr(rows, name)
    types = {
        "student": "*fp32", "teacher": "*fp32", "losses": "*fp32", "labels": "*i64", "V": "i32",
        "student_stride": "i32", "teacher_stride": "i32",
        "inverse_temperature": "fp32", "weight": "fp32", "hard": "fp32",
    }
    signature = {one: types.get(one, "constexpr") for one in kernel.arg_names}
    aligned = [
        (number,) for number, one in enumerate(kernel.arg_names)
        if signature[one].startswith("*") or signature[one] == "i32"
    ]
    source = ASTSource(
        kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned}
    )
    done = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": rows.WARPS}
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx = pathlib.Path(folder, "kernel.ptx")
        ptx.write_text(done.asm["ptx"])
        told = subprocess.run(
            [ptxas, "-v", f"--gpu-name={re.search('[.]target (sm_[0-9a-z]+)', done.asm['ptx'])[1]}",
             str(ptx), "-o", str(ptx) + ".cubin"],
            capture_output=True, text=True, check=True,
        ).stderr
    loads = re.findall(r"ld[.]global[.a-z0-9_:]*?([.]v4)?[.][bf]32", done.asm["ptx"])
    print(json.dumps({
        "registers": int(re.search(r"Used ([0-9]+) registers", told)[1]),
        "spilled": sum(map(int, re.findall(r"([0-9]+) bytes spill", told))),
        "loads": len(loads), "wide": sum(one == ".v4" for one in loads),
    }))
"""
CROSS_ENTROPY: tuple[str, dict[str, Any]] = ("cross_entropy_kernel", {"BLOCK": 4096})


def divergence(mode: int, hard: bool, tempered: bool) -> tuple[str, dict[str, Any]]:
    constants = {"MODE": mode, "HARD": hard, "TEMPERED": tempered, "BLOCK": 4096}
    return "divergence_kernel", constants


def compiled(architecture: int, *requests: tuple[str, dict[str, Any]]) -> list[dict[str, int]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(architecture), json.dumps(requests)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)]


def check(found: list[dict[str, int]]) -> None:
    for one in found:
        assert one["spilled"] == 0
        assert one["registers"] <= 96  # 16 warps: one program a multiprocessor would be at 128
        assert one["wide"] >= one["loads"] - 2  # the label and its logit are single numbers


def test_two_kernels_fit_the_registers_of_an_h100() -> None:
    found = compiled(90, divergence(0, False, False), divergence(2, True, True), CROSS_ENTROPY)
    assert len(found) == 3
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_all_kernels_fit_the_registers(architecture: int) -> None:
    flags = [(False, False), (True, False), (True, True)]
    requests = [divergence(mode, *pair) for mode in range(6) for pair in flags]
    found = compiled(architecture, *requests, CROSS_ENTROPY)
    assert len(found) == len(requests) + 1
    check(found)
