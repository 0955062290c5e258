"""Shows the doctests in docstrings as code in the API reference (a griffe extension, see mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n|\Z).*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts a fence round whatever begins with ``>>>`` and ends at an empty line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once an object and what belongs to it are read."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
