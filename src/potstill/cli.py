"""The command line: find the command, parse, print errors. `potstill --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from potstill.commands.parsing import command_module, parse
from potstill.errors import ConfigError, PotstillError
from potstill.processes import process_count
from potstill.progress import close_lines, quiet_libraries, replace_library_bars

__all__ = ["main", "parse"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return 0 (done), 2 (the user can fix it) or 130 (interrupted)."""
    try:
        return _run(arguments)
    except PotstillError as error:
        return _failed(str(error))
    except RuntimeError as error:
        # torch's class; torch itself is imported only by commands that need it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:120]
        return _failed(
            f"out of device memory ({reason}); lower --batch-size and raise "
            "--gradient-accumulation-steps as much, or lower --max-length; finished work is kept"
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        return _failed(f"{place}{reason}; free space or choose another folder")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _failed("interrupted; the same command continues the run", status=130)


def _run(arguments: Sequence[str] | None) -> int:
    is_own_process = arguments is None  # not where another program, such as a test, calls main
    if is_own_process:
        quiet_libraries()
    command, recipe = parse(list(sys.argv[1:] if arguments is None else arguments))
    if process_count() > 1 and command != "distill":
        raise ConfigError(
            f"{command} runs in one process, and {process_count()} were started; "
            "start it without torchrun or accelerate"
        )
    if is_own_process:
        replace_library_bars()
    command_module(command).run(recipe)
    return 0


def _failed(line: str, *, status: int = 2) -> int:
    close_lines()
    print(f"potstill: {line}", file=sys.stderr)
    return status
