"""Show on stderr how far long work is: one live line in a terminal, plain lines elsewhere.

A live line has at most 80 columns, and there is never more than one. Without a terminal (a file, a
pipe, TERM=dumb), a plain line is written at most every ten seconds, and a last one at the end.
Nothing is colored.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import Any, ClassVar

from tqdm import tqdm

from potstill.processes import is_main_process

COLUMNS = 80
PLAIN_SECONDS = 10.0
"""Seconds between two plain lines, also of different work."""
BRIEF_SECONDS = 1.0
"""A live line that is cleared at the end is shown only if the work takes longer than this."""

COUNT = "{n_fmt}/{total_fmt} {unit}{postfix}"
BAR = "{desc}: {percentage:3.0f}%|{bar}| "
UNFINISHED, FINISHED = COUNT + ", {remaining} left", COUNT + ", took {elapsed}"


class Progress:
    """Count ``total`` pieces of work inside a ``with`` block.

    ``leave`` keeps the last line; with ``shown=False`` there is no line. Inside another `Progress`
    there is no second line: with the same ``unit`` the inner one advances the outer one until the
    inner one ends, and then the outer one counts these pieces itself.
    """

    _outermost: ClassVar[Progress | None] = None

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str,
        done: int = 0,
        leave: bool = False,
        shown: bool = True,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.leave, self.shown = leave, shown
        self.done = self._begun = done
        self._outer: Progress | None = None
        self._line: _Line | None = None

    def __enter__(self) -> Progress:
        self._outer = Progress._outermost
        if self._outer is None:
            Progress._outermost = self
            if self.shown and is_main_process():
                self._line = _Line(self)
        return self

    def update(self, count: int = 1, *, note: str = "") -> None:
        """Count more pieces; ``note`` is shown behind the count."""
        self.done += count
        if self._line is not None:
            if note:
                self._line.set_postfix_str(note, refresh=False)
            self._line.update(count)
        elif self._outer is not None and self._outer.unit == self.unit:
            self._outer.update(count)

    def __exit__(self, error: object, *_: object) -> None:
        if self._outer is None:
            Progress._outermost = None
        elif self._outer.unit == self.unit:
            self._outer.update(self._begun - self.done)
        if self._line is not None:
            self._line.end(leave=self.leave and error is None)


class _Line(tqdm):  # type: ignore[type-arg]
    """A tqdm bar of our format, or plain lines."""

    monitor_interval = 0  # no thread

    def __init__(self, progress: Progress) -> None:
        self.is_live = is_terminal()
        self._format = BAR if self.is_live else "{desc}: "
        super().__init__(
            total=progress.total,
            initial=progress.done,
            desc=progress.label,
            unit=progress.unit,
            bar_format=self._format + UNFINISHED,
            leave=False,
            file=sys.stderr if self.is_live else _PlainLines(),
            disable=False,
            ncols=columns() if self.is_live else None,
            delay=0.0 if self.is_live and progress.leave else BRIEF_SECONDS,
            miniters=1,
            smoothing=0,
        )

    def end(self, *, leave: bool) -> None:
        """Keep the line as the last one, or clear it."""
        self.bar_format, self.leave = self._format + FINISHED, leave and self.is_live
        self.close()
        if leave and not self.is_live:
            _PlainLines.write_now(str(self))


class _PlainLines:
    """Write what tqdm draws as lines without carriage returns, one every `PLAIN_SECONDS`."""

    _written_at: ClassVar[float] = time.monotonic()

    def write(self, text: str) -> None:
        """Write a line, unless it is blank or too soon after the last one."""
        if text.strip() and time.monotonic() - self._written_at >= PLAIN_SECONDS:
            self.write_now(text)

    @classmethod
    def write_now(cls, text: str) -> None:
        """Write a line."""
        cls._written_at = time.monotonic()
        print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: each line is flushed."""


def is_terminal() -> bool:
    """Return whether stderr can rewrite a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """Return the width of a live line: at most 80 columns, two of them for the ^C of Ctrl+C."""
    try:
        found = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # a notebook's or a test's stderr
        found = 0
    return min(found or COLUMNS, COLUMNS) - 2


def close_lines() -> None:
    """Clear or end every line, also of libraries, before an error is printed."""
    for line in list(getattr(tqdm, "_instances", ())):
        line.close()


def quiet_libraries() -> None:
    """Silence warnings of libraries that are imported later, and bars of datasets.

    TRANSFORMERS_VERBOSITY, DATASETS_VERBOSITY, HF_HUB_VERBOSITY and `python -W` overrule it.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for logger in (logging.getLogger(), logging.getLogger("torch.utils")):
        logger.setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def replace_library_bars() -> None:
    """Let transformers show its bars like ours. This imports transformers."""
    from transformers.utils.logging import set_tqdm_hook

    set_tqdm_hook(_library_bar)


def _library_bar(_: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """Return transformers' bar, in a terminal and for long work only, and cleared at the end.

    Without a terminal, or inside a `Progress`, it is not shown.
    """
    is_shown = is_terminal() and Progress._outermost is None and is_main_process()
    ours = {"leave": False, "delay": BRIEF_SECONDS, "ncols": columns(), "disable": not is_shown}
    return tqdm(*arguments, **{**settings, **ours})
