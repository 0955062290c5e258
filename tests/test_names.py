"""Every file, command, flag and make target that text or code names exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from potstill.commands import COMMANDS, SUMMARIES
from potstill.commands.parsing import recipe_of
from potstill.losses.records import all_parameters
from potstill.training import METHODS

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "docs", "tests", "examples", "benchmarks", ".github")
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".yaml", ".yml")
} | {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))}
FILES = [path for path in TEXTS if path.endswith((".py", ".md"))]
PROSE = [path for path in TEXTS if not path.startswith("tests/")]
CALLERS_OWN = {"FILE.py", "NAME.py", "mine.py", "choose.py", "filters_of_mine.py"}
OTHER_PROJECTS = {"modeling_llama.py", "README.md", "utils.py"}


def known(name: str) -> bool:
    return any(path == name or path.endswith("/" + name) for path in FILES)


@pytest.mark.parametrize("path", PROSE)
def test_every_python_file_and_page_that_is_named_exists(path: str) -> None:
    named = set(re.findall(r"(?<![\w/.*{}-])((?:[\w-]+/)*[\w-]+\.(?:py|md))\b", TEXTS[path]))
    relative = {name for name in named if (ROOT / path).parent.joinpath(name).exists()}
    missing = {name for name in named - CALLERS_OWN - OTHER_PROJECTS - relative if not known(name)}
    assert not missing


@pytest.mark.parametrize("path", PROSE)
def test_every_make_target_that_is_named_exists(path: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", TEXTS[path]):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", [path for path in PROSE if path.endswith(".md")])
def test_every_potstill_command_that_is_named_exists(path: str) -> None:
    for command in re.findall(r"`potstill ([a-z]+)", TEXTS[path]):
        assert command in {*COMMANDS, *METHODS}  # tables name a method `potstill logits`


@pytest.mark.parametrize("path", [path for path in PROSE if path.endswith(".md")])
def test_every_flag_of_a_potstill_command_exists(path: str) -> None:
    flags = {"--config", "--help", "--version", "--demo", "--precision"}
    for command in COMMANDS:
        fields = dataclasses.fields(recipe_of(command))
        flags |= {"--" + field.name.replace("_", "-") for field in fields}
    flags |= {"--" + name.replace("_", "-") for name in all_parameters()}
    for code in re.findall(r"`potstill ([^`\n]+)`", TEXTS[path]):
        assert set(re.findall(r"--[a-z][a-z-]*", code)) <= flags, code


@pytest.mark.parametrize("command", COMMANDS)
def test_the_summary_of_a_command_is_its_recipes_first_line(command: str) -> None:
    assert (recipe_of(command).__doc__ or "").splitlines()[0] == SUMMARIES[command]
