"""The command line: find the command, parse, print errors. `potstill --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from potstill.commands.parsing import command_module, parse
from potstill.errors import ConfigError, PotstillError
from potstill.processes import process_count

__all__ = ["main", "parse"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return 0 (done), 2 (the user can fix it) or 130 (interrupted)."""
    try:
        command, recipe = parse(list(sys.argv[1:] if arguments is None else arguments))
        if process_count() > 1 and command != "distill":
            raise ConfigError(
                f"{command} runs in one process, and {process_count()} were started; "
                "start it without torchrun or accelerate"
            )
        command_module(command).run(recipe)
        return 0
    except PotstillError as error:
        print(f"potstill: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch's class; torch itself is imported only by commands that need it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:120]
        print(
            f"potstill: out of device memory ({reason}); lower --batch-size and raise "
            "--gradient-accumulation-steps as much, or lower --max-length; finished work is kept",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        print(f"potstill: {place}{reason}; free space or choose another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npotstill: interrupted; the same command continues the run", file=sys.stderr)
        return 130
