from __future__ import annotations

import ast
from pathlib import Path

import potstill

SOURCE = Path(potstill.__file__).parent


def test_public_names_are_sorted_and_each_can_be_had() -> None:
    assert potstill.__all__ == sorted(potstill.__all__)
    assert all(getattr(potstill, name) is not None for name in potstill.__all__)


def test_files_and_functions_stay_small_enough_to_hold_in_the_head() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"


def test_every_file_begins_by_saying_what_it_is_for() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text)), path
