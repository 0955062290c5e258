"""Coordinate the processes of one run (torchrun, accelerate launch)."""

from __future__ import annotations

import os
from typing import TypeVar

Value = TypeVar("Value")


def process_count() -> int:
    """Return the number of processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Return whether this process prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def print_main(line: str) -> None:
    """Print from the main process only."""
    if is_main_process():
        print(line, flush=True)


def broadcast_from_main(value: Value) -> Value:
    """Return the main process's ``value`` in every process. All must call it.

    `transformers.TrainingArguments` must have started the process group.
    """
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]
