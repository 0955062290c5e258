"""A run's folder: what stands where, and the rule that nothing in it is half-written.

RUN_DIR/
  config.yaml        everything resolved: enough to run it again
  student/           the student, a Hugging Face folder
  metrics.jsonl      one row a logged step
  evaluation.json    teacher, before, after, samples, gap closed
  report.html        the page
  checkpoints/       to go on from after an interrupt
  data/              text the run made itself (the demo's)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from potstill.errors import RunFolderError


class RunFolder:
    """The folder at ``path``, which need not exist yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.config, self.student = self.path / "config.yaml", self.path / "student"
        self.metrics, self.evaluation = self.path / "metrics.jsonl", self.path / "evaluation.json"
        self.checkpoints, self.data = self.path / "checkpoints", self.path / "data"

    def refuse_other(self, config: dict[str, Any], *, but: Collection[str] = ()) -> None:
        """Raises: RunFolderError if the folder holds anything but a run begun with ``config``, naming what differs.

        What ``but`` names may have changed since.
        """
        if self.config.is_file():
            begun = self.read_config()
            for key, value in config.items():
                planned = key == "max_steps" and value is None  # found out by the run itself
                if begun.get(key) != value and not planned and key not in but:
                    raise RunFolderError(
                        f"{self.path}: holds a run with {key} {begun.get(key)}, not {value}; give another --output-dir, or "
                        "delete the folder"
                    )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(
                f"{self.path}: not empty, and not a run of potstill's; give another --output-dir"
            )

    def begin(self, config: dict[str, Any]) -> None:
        """Make the folder, with its settings in it; or replace the settings of a run that has begun."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def note_data(self, fingerprints: dict[str, str]) -> None:
        """Keep what the data were, beside the checkpoints that only they can go on from."""
        self.checkpoints.mkdir(exist_ok=True)
        write_json(self.checkpoints / "data.json", fingerprints)

    def refuse_other_data(self, fingerprints: dict[str, str]) -> None:
        """Raises: RunFolderError if the run began with data of other fingerprints."""
        file = self.checkpoints / "data.json"
        noted = json.loads(file.read_bytes()) if file.is_file() else {}
        for name, now in fingerprints.items():
            if noted.get(name, now) != now:
                raise RunFolderError(
                    f"{self.path}: the conversations of this run ({name}) have changed since it began, so it cannot go on; give "
                    "the same data, or another --output-dir"
                )

    def planned_steps(self) -> int | None:
        """The steps that an earlier call planned from its budget in seconds."""
        return self.read_config().get("max_steps") if self.config.is_file() else None

    def read_config(self) -> dict[str, Any]:
        """The run's settings. Raises: RunFolderError if there are none, or they are damaged."""
        try:
            config = yaml.safe_load(self.config.read_bytes())
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: no readable config.yaml there, so not a run; give a run's folder"
            ) from error
        except (yaml.YAMLError, ValueError) as error:
            raise RunFolderError(
                f"{self.config}: damaged (not YAML); mend it by hand, or run again into another folder"
            ) from error
        if not isinstance(config, dict):
            raise RunFolderError(
                f"{self.config}: damaged (no settings); mend it by hand, or run again into another folder"
            )
        return config

    def read_evaluation(self) -> dict[str, Any]:
        """What was measured at the end. Raises: RunFolderError if nothing was, or the file is damaged."""
        try:
            evaluation = json.loads(self.evaluation.read_bytes())
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: no evaluation.json there; let the run come to its end, with its own command"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{self.evaluation}: damaged (not JSON); delete it and give the run's command again"
            ) from error
        if not isinstance(evaluation, dict):
            raise RunFolderError(
                f"{self.evaluation}: damaged (no JSON object); delete it and give the run's command again"
            )
        return evaluation

    def read_metrics(self) -> tuple[list[dict[str, Any]], int]:
        """The logged rows, and how many lines were not one: a run that was cut off leaves half a line."""
        return read_rows(self.metrics)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end; unfinished ones are deleted."""
        found = sorted(
            self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
        )
        for folder in reversed(found):
            if (folder / "trainer_state.json").is_file():  # what the Trainer writes last
                return folder
            shutil.rmtree(folder)
        return None


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file's lines, and how many lines are none: a run that was cut off leaves half a line."""
    rows, unreadable = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unreadable += 1
    return rows, unreadable


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either there whole or not there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """`write_whole`, as JSON."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``path`` when all is written, and vanishes if something goes wrong."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
