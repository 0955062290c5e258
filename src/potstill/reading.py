"""Say how the rows of a data set are read."""

from __future__ import annotations

from dataclasses import dataclass, fields

from potstill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Say how rows are read."""

    split: str = "train"
    """The split of a data set that has several."""
    data_name: str | None = None
    """The configuration of a data set on the hub that has several."""
    columns: str | None = None
    """Columns to read under other names: prompt=question,completion=answer."""
    merge_system: bool = False
    """Put the system prompt into the first user turn, for templates without a system role."""

    @property
    def reading(self) -> Reading:
        """These settings alone, without those of a class that inherits them."""
        return Reading(**{item.name: getattr(self, item.name) for item in fields(Reading)})

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
