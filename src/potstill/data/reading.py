"""Say how the rows of a data set are read."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.errors import ConfigError


@dataclass(frozen=True)
class Reading:
    """Say how rows are read."""

    split: str = "train"
    """The split of a data set."""
    data_name: str | None = None
    """The configuration of a data set on the hub."""
    columns: str | None = None
    """New names of columns: ``prompt=question,completion=answer``."""
    merge_system: bool = False
    """Put the system prompt at the beginning of the first user turn."""

    def renamed_columns(self) -> dict[str, str]:
        """Return the old name by the new name of each column. Raises: ConfigError."""
        names = {}
        for pair in filter(None, (pair.strip() for pair in (self.columns or "").split(","))):
            new, equals, old = (part.strip() for part in pair.partition("="))
            if not (new and equals and old):
                need = "NEW=OLD pairs, as in prompt=question,completion=answer"
                raise ConfigError(f"columns {self.columns!r}: needs {need}")
            names[new] = old
        return names
