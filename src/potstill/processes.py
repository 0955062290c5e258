"""Coordinate the processes of one run (torchrun, accelerate launch)."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TypeVar

from tqdm import tqdm

Value = TypeVar("Value")


def process_count() -> int:
    """Return the number of processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Return whether this process prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def print_main(line: str) -> None:
    """Print from the main process only, above a progress line if there is one.

    A terminal gets long lines wrapped between words.
    """
    if not is_main_process():
        return
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = "\n".join(_wrapped(part, width) for part in line.split("\n"))
    with tqdm.external_write_mode():
        print(line, flush=True)


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width or "  " in line.strip():  # a table's line stays as it is
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def broadcast_from_main(value: Value) -> Value:
    """Return the main process's ``value`` in every process. All must call it.

    `transformers.TrainingArguments` must have started the process group.
    """
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]
