"""Import the public names of a package when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def imported(name: str, package: str, homes: Mapping[str, str]) -> Any:
    """Return what ``package``'s `__getattr__` must return for ``name``.

    ``homes`` has the module of each name; a module can be a public name itself. Raises:
    AttributeError for another name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module = importlib.import_module(homes[name])
    return module if homes[name] == f"{package}.{name}" else getattr(module, name)
