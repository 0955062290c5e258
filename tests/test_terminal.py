"""What the commands print: one progress line of 80 columns in a terminal, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from conftest import conversations, write_rows
from potstill import progress
from potstill.commands import COMMANDS

POTSTILL = [sys.executable, "-m", "potstill"]
ON_CPU = "--device cpu --precision fp32"
TERMINAL = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "TQDM_MININTERVAL": "0"}
GENERATE = (
    f"generate teacher --prompts prompts.jsonl --output-dir made --max-new-tokens 24 {ON_CPU}"
)
DISTILL = f"distill teacher student --data data.jsonl --output-dir run --max-steps 6 {ON_CPU}"
RUNS = {
    "generate": f"{GENERATE} --batch-size 4 --keep cut_off,repetition_loop,empty",
    "distill": f"{DISTILL} --batch-size 4 --eval-steps 2",
    "evaluate": f"evaluate student --teacher teacher --data data.jsonl {ON_CPU}",
    "capture": f"capture teacher --data data.jsonl --output-dir captured {ON_CPU}",
    "student": "student teacher --output-dir cut --data data.jsonl",
    "compare": f"compare teacher student --data data.jsonl --output-dir compared --max-steps 2 "
    f"--methods text,logits --answer-tokens 8 {ON_CPU}",
}
BAR = re.compile(r"\d+%\|")


@pytest.fixture
def place(pair_folder: Path) -> Path:
    """Make a teacher, a student, data and prompts."""
    write_rows(pair_folder / "data.jsonl", conversations(20))
    write_rows(pair_folder / "prompts.jsonl", [{"prompt": f"the rain {i}?"} for i in range(12)])
    return pair_folder


def in_terminal(command: list[str], *, term: str = "xterm", interrupt_at: str = "") -> str:
    """Run a command in a pseudo-terminal of 80 columns; return everything that it wrote.

    Ctrl+C is pressed once, when ``interrupt_at`` appears.
    """
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env={**TERMINAL, "TERM": term},
    )
    os.close(inner)
    written, is_pressed = b"", False
    while True:
        try:
            part = os.read(outer, 1 << 16)
        except OSError:  # the command has ended
            break
        if not part:
            break
        written += part
        if interrupt_at and not is_pressed and interrupt_at.encode() in written:
            os.write(outer, b"\x03")
            is_pressed = True
    process.wait()
    os.close(outer)
    return written.decode()


def lines_of(written: str) -> list[str]:
    """Return the lines, and the states of a line that was rewritten."""
    return re.split(r"[\r\n]+", written)


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_in_a_terminal_no_line_is_wider_than_80_columns_and_one_bar_is_shown(
    place: Path, command: str
) -> None:
    written = in_terminal([*POTSTILL, *shlex.split(RUNS[command])])
    lines = lines_of(written)
    assert "potstill:" not in written
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert "\x1b" not in written  # a second bar would move the cursor up; nothing is colored
    assert all(len(BAR.findall(line)) <= 1 for line in lines)
    assert "[transformers]" not in written
    assert "Warning" not in written
    for line in lines:  # nothing else shares a line with a bar
        assert not BAR.search(line) or re.fullmatch(r"[a-z0-9 ]+: .* (left|took [\d:]+)", line)


@pytest.mark.slow
def test_training_shows_step_loss_speed_and_time_left_in_one_line(place: Path) -> None:
    states = lines_of(in_terminal([*POTSTILL, *shlex.split(RUNS["distill"])]))
    shown = [line for line in states if line.startswith("training:") and "loss" in line]
    state = r"training: +\d+%\|.*\| \d/6 steps, loss \d\.\d{3}, \d+ tokens/s, "
    assert shown
    assert all(re.match(state, line) for line in shown)
    assert re.search(r"6/6 steps.*, took \d\d:\d\d$", shown[-1])


FAILING = """
import sys
from potstill import cli
from potstill.distillation import training
from potstill.errors import NonFiniteLoss
step = training.DistillationTrainer.training_step
def failing(self, *args, **kwargs):
    if self.state.global_step == 3:
        raise NonFiniteLoss("the loss became nan")
    return step(self, *args, **kwargs)
training.DistillationTrainer.training_step = failing
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_an_error_while_a_bar_is_shown_has_a_line_of_its_own(place: Path) -> None:
    written = in_terminal([sys.executable, "-c", FAILING, *shlex.split(RUNS["distill"])])
    states = lines_of(written)
    assert any(line.startswith("training:") and "2/6" in line for line in states)
    assert states[-2:] == ["potstill: the loss became nan", ""]
    assert states[-3].strip() == ""  # the bar is cleared


@pytest.mark.slow
def test_ctrl_c_clears_the_bar_and_has_a_line_of_its_own(place: Path) -> None:
    longer = RUNS["distill"].replace("--max-steps 6", "--max-steps 3000")
    written = in_terminal([*POTSTILL, *shlex.split(longer)], interrupt_at="loss")
    line = "potstill: interrupted; the same command continues the run"
    assert lines_of(written)[-2:] == [line, ""]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_without_a_terminal_there_are_plain_lines_and_no_warnings(
    place: Path, command: str
) -> None:
    done = subprocess.run(
        [*POTSTILL, *shlex.split(RUNS[command])], capture_output=True, check=True, env=TERMINAL
    )
    for written in (done.stdout, done.stderr):
        assert b"\r" not in written
        assert b"\x1b" not in written
    # nothing but the last line of each bar that is kept
    kept = r"(training|answering): (\d+)/\2 (steps|answers).*, took \d\d:\d\d"
    assert all(re.fullmatch(kept, line) for line in done.stderr.decode().splitlines())


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_lines(place: Path) -> None:
    written = in_terminal([*POTSTILL, *shlex.split(RUNS["generate"])], term="dumb")
    assert "answering: 12/12 answers, took" in written
    assert not BAR.search(written)


def test_plain_lines_are_at_most_one_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(progress._PlainLines, "_written_at", now)
    for label in ("reading", "writing"):
        with progress.Progress(label, 8, unit="files", leave=label == "writing") as shown:
            for _ in range(8):
                now += 2
                shown.update()
    assert capsys.readouterr().err.splitlines() == [
        "reading: 5/8 files, 00:06 left",
        "writing: 2/8 files, 00:12 left",
        "writing: 7/8 files, 00:02 left",
        "writing: 8/8 files, took 00:16",
    ]


def test_an_inner_bar_of_the_same_unit_advances_the_outer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outer = progress.Progress("answering", 10, unit="answers", shown=False)
    counts = []
    with outer:
        for _ in range(2):
            with progress.Progress("answering", 5, unit="answers") as inner:
                inner.update(3)
                counts.append(outer.done)
            with progress.Progress("scoring", 7, unit="batches") as other:
                other.update(7)
            outer.update(5)
            counts.append(outer.done)
    assert counts == [3, 5, 8, 10]


HELP = """
import contextlib, io, sys
from potstill import cli
from potstill.commands import COMMANDS
for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    heavy = {"torch", "transformers", "datasets"} & sys.modules.keys()
    assert not heavy, (command, heavy)
print(len(COMMANDS), "helps")
"""


def test_the_help_of_no_command_imports_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.stdout == f"{len(COMMANDS)} helps\n", done.stderr
