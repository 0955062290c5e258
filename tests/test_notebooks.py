"""The notebooks: one for each script, readable, and run with the demo's models."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("distiller_*.py"))
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    read: dict[str, Any] = json.loads(notebook.read_text(encoding="utf-8"))
    assert (read["nbformat"], read["nbformat_minor"] >= 5) == (4, True)
    assert all(cell.get("id") for cell in read["cells"])
    assert all(not cell.get("outputs") for cell in read["cells"])
    return ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == kind]


def test_each_script_has_a_notebook() -> None:
    assert len(SCRIPTS) == 5
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_has_no_outputs_and_begins_as_a_demo(notebook: Path) -> None:
    code = cells(notebook, "code")
    for cell in code:
        ast.parse(cell)
        assert cell.count("\n") < 40
        assert max(map(len, cell.split("\n"))) <= 100
    assert "DEMO = True" in code[0]
    for link in re.findall(r"\]\(([^)#]*)\)", "\n".join(cells(notebook, "markdown"))):
        assert link.startswith("http") or (notebook.parent / link).exists()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_with_the_demos_models(notebook: Path, tmp_path: Path) -> None:
    program = "\n\n".join(cells(notebook, "code"))
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(r"better than \w+ by \d", run.stdout), run.stdout[-2000:]
