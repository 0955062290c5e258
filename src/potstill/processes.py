"""One run in several processes (torchrun, accelerate launch): who speaks and writes, and what all must agree on."""

from __future__ import annotations

import os
from typing import Any


def process_count() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this is the one that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def print_main(line: str) -> None:
    """Print, once."""
    if is_main_process():
        print(line, flush=True)


def broadcast_from_main(value: Any) -> Any:
    """The main process's ``value``, in all of them. Each must ask; `transformers.TrainingArguments` must have begun the group."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
