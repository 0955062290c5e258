"""`potstill report`: write the report of a run again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportRecipe:
    """Write the report of a run again."""

    run_dir: str
    """Folder of the run."""


def run(recipe: ReportRecipe) -> None:
    """Write report.html and print its path."""
    from potstill.report import write_report

    print(f"report: {write_report(Path(recipe.run_dir).expanduser())}")
