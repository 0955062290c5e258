"""The folder of a run: the names of its files; every file is written whole or not at all.

RUN_DIR/
  config.yaml        every setting of the run, defaults included
  student/           the student, a Hugging Face folder
  metrics.jsonl      one row per logged step
  evaluation.json    measures of the teacher, the student before and after; sample answers
  report.html        the report
  checkpoints/       the state from which an interrupted run continues
  rollouts/          what the student wrote (on-policy), with the teacher's states
  data/              text that the run made itself (demo)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from potstill.errors import RunFolderError

PROCESSES = "processes"
"""The fingerprint that is the number of processes."""


class RunFolder:
    """The folder at ``path``, which need not exist yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.config, self.student = self.path / "config.yaml", self.path / "student"
        self.metrics, self.evaluation = self.path / "metrics.jsonl", self.path / "evaluation.json"
        self.checkpoints, self.data = self.path / "checkpoints", self.path / "data"
        self.rollouts = self.path / "rollouts"

    def refuse_other(
        self,
        config: dict[str, Any],
        *,
        but: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Accept a missing or empty folder, or a run with this config; keys in ``but`` may differ.

        A run of an earlier version has the ``defaults`` of settings that it did not know.
        Raises: RunFolderError that names the setting that differs, or the folder that is no run.
        """
        if self.config.is_file():
            stored = {**(defaults or {}), **self.read_config()}
            for key, value in config.items():
                # The run chooses these when it begins.
                planned = key in ("max_steps", "template_date") and value is None
                planned |= key == "template_date" and stored.get(key) is None
                if stored.get(key) != value and not planned and key not in but:
                    raise RunFolderError(
                        f"{self.path}: holds a run with {key} {stored.get(key)}, not {value}; "
                        "give another --output-dir, or delete the folder"
                    )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(
                f"{self.path}: not empty, and not a run of potstill; give another --output-dir"
            )

    def begin(self, config: dict[str, Any]) -> None:
        """Create the folder and write its settings, or replace the settings of an existing run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def forget(self) -> None:
        """Delete settings, metrics and checkpoints, and the folder if nothing else is in it."""
        for folder in (self.checkpoints, self.rollouts):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.metrics):
            file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def note_data(self, fingerprints: dict[str, str]) -> None:
        """Store the fingerprints of data and served teacher next to the checkpoints."""
        self.checkpoints.mkdir(exist_ok=True)
        write_json(self.checkpoints / "data.json", fingerprints)

    def refuse_other_data(self, fingerprints: dict[str, str]) -> None:
        """Compare with the stored fingerprints. Raises: RunFolderError if one differs."""
        file = self.checkpoints / "data.json"
        stored = json.loads(file.read_bytes()) if file.is_file() else {}
        for name, current in fingerprints.items():
            if stored.get(name, current) != current and name == PROCESSES:
                raise RunFolderError(
                    f"{self.path}: this run began with {stored[name]} processes and each read its "
                    f"own conversations, so it cannot continue with {current}; start "
                    f"{stored[name]}, or give another --output-dir"
                )
            if stored.get(name, current) != current:
                what = "teacher" if name == "teacher" else "data"
                raise RunFolderError(
                    f"{self.path}: the {what} of this run ({name}) has changed since it began, so "
                    f"it cannot continue; give the same {what}, or another --output-dir"
                )

    def planned_steps(self) -> int | None:
        """Return the steps that an earlier call computed from its budget in seconds."""
        return self.read_config().get("max_steps") if self.config.is_file() else None

    def read_config(self) -> dict[str, Any]:
        """Return the run's settings. Raises: RunFolderError if the file is missing or damaged."""
        try:
            config = yaml.safe_load(self.config.read_bytes())
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: no readable config.yaml, so not a run; give the folder of a run"
            ) from error
        except (yaml.YAMLError, ValueError) as error:
            raise RunFolderError(self._damaged_config("not YAML")) from error
        if not isinstance(config, dict):
            raise RunFolderError(self._damaged_config("no settings"))
        return config

    def _damaged_config(self, reason: str) -> str:
        return f"{self.config}: damaged ({reason}); fix it by hand, or run again in another folder"

    def read_evaluation(self) -> dict[str, Any]:
        """Return evaluation.json. Raises: RunFolderError if the file is missing or damaged."""
        rerun = "delete it and run the same command again"
        try:
            evaluation = json.loads(self.evaluation.read_bytes(), parse_constant=_refuse_constant)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: no evaluation.json there; finish the run with its own command"
            ) from error
        except (ValueError, RecursionError) as error:
            found = str(error) if isinstance(error, _NoNumber) else "not JSON"
            raise RunFolderError(f"{self.evaluation}: damaged ({found}); {rerun}") from error
        if not isinstance(evaluation, dict):
            raise RunFolderError(f"{self.evaluation}: damaged (no JSON object); {rerun}")
        return evaluation

    def read_metrics(self) -> tuple[list[dict[str, Any]], int]:
        """Return the logged rows, and how many lines could not be read."""
        return read_rows(self.metrics)

    def last_checkpoint(self, *, processes: int = 1) -> Path | None:
        """Return the newest complete checkpoint, and delete incomplete ones that are newer.

        Of several ``processes`` each writes its random state.
        """
        found = sorted(
            self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
        )
        for folder in reversed(found):
            needed = ["trainer_state.json"]  # the main process writes it last
            if processes > 1:
                needed += [f"rng_state_{rank}.pth" for rank in range(processes)]
            if all((folder / name).is_file() for name in needed):
                return folder
            shutil.rmtree(folder)
        return None


class _NoNumber(ValueError):
    """A value that JSON does not have."""


def _refuse_constant(name: str) -> None:
    raise _NoNumber(f"a result is {name}: the measurement overflowed")


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects of a JSON Lines file, and how many lines are not objects.

    An interrupted run can leave half a line. A missing file has no rows.
    """
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
    """Write a file completely or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, completely or not at all.

    Raises: RunFolderError if a number is NaN or infinite, which JSON cannot hold.
    """
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        found = "not written, because a result is NaN or infinite"
        raise RunFolderError(f"{path}: {found}; use another precision") from error
    write_whole(path, text + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path`` at the end, or deleted on an error."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
