"""Every message on the page Troubleshooting is one that the library prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADINGS = re.findall(r"^### (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def texts_of_source() -> str:
    """Return all strings of src/, with a line break where an f-string has a value."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\n" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


SOURCE = texts_of_source()


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_message_of_the_page_is_in_the_source(heading: str) -> None:
    for part in re.split(r"\s*…\s*", heading):
        assert part.strip() in SOURCE


def test_the_page_has_messages() -> None:
    assert len(HEADINGS) >= 25
