"""What the README says can be done, done."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from potstill import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_in_the_readme_parses() -> None:
    commands = re.findall(r"^potstill (.+)$", README, re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        cli.parse(command.split())


def test_every_recipe_parses() -> None:
    recipes = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        cli.parse(["distill", "--config", str(recipe)])


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_file_the_readme_points_to_exists() -> None:
    for link in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / link).is_file(), link
    for script in re.findall(r"`(distiller_\w+\.py)`", README):
        assert (ROOT / "examples" / script).is_file(), script


@pytest.mark.slow
def test_the_python_in_the_readme_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)
