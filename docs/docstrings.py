"""Makes docstrings the Markdown of the API reference (a griffe extension, see mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
LAST_LINES = re.compile(r"(?:^|\s)(?=(?:Raises|Source): )")


class Docstrings(griffe.Extension):
    """Doctests are code, and what is raised and where it comes from are paragraphs of their own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once an object and what belongs to it are read."""
        if obj.docstring is not None:
            text = LAST_LINES.sub("\n\n", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", text)
