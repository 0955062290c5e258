"""Convert docstrings to Markdown for the API reference (a griffe extension, see mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
LAST_LINES = re.compile(r"(?:^|\s)(?=(?:Raises|Source): )")


class Docstrings(griffe.Extension):
    """Make doctests code blocks, and start a paragraph at each ``Raises:`` and ``Source:``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert the docstring of ``obj``; griffe calls this after it has read the object."""
        if obj.docstring is not None:
            text = LAST_LINES.sub("\n\n", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", text)
