"""Run `potstill generate` on tiny models: interruptions and errors."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from potstill import cli
from potstill.generation import LocalEngine, Sampling

KEEP = "cut_off,repetition_loop,empty"


@pytest.fixture
def place(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with a teacher and prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(model_folder())
    write_prompts(tmp_path / "prompts.jsonl", 20)
    return tmp_path


def write_prompts(file: Path, count: int) -> None:
    file.write_text(
        "".join(
            json.dumps({"prompt": f"the rain {i}" + " on" * (i % 5)}) + "\n" for i in range(count)
        )
    )


def command(*more: str, output: str = "out", prompts: str = "prompts.jsonl") -> list[str]:
    fixed = [
        "--prompts",
        prompts,
        "--output-dir",
        output,
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--keep",
        KEEP,
    ]
    return [
        "generate",
        "teacher",
        *fixed,
        "--max-new-tokens",
        "6",
        "--batch-size",
        "2",
        "--similarity",
        "1",
        *more,
    ]


def rows(folder: str | Path, name: str = "conversations.jsonl") -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (Path(folder) / name).read_text(encoding="utf-8").split("\n")[:-1]
    ]


def test_the_data_set_opens_everywhere_and_records_how_it_was_made(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command("--system", "be brief")) == 0
    assert "| kept | 20 |" in capsys.readouterr().out
    import datasets

    opened = datasets.load_dataset("out", cache_dir=str(place / "cache"))["train"]
    assert opened["messages"][3] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the rain 3 on on on"},
        {"role": "assistant", "content": rows("out")[3]["messages"][2]["content"]},
    ]
    assert opened[0]["sampling"] == {
        "temperature": 0.7,
        "top_p": 0.95,
        "max_new_tokens": 6,
        "seed": 0,
    }
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["made_with"].keys() >= {
        "teacher",
        "revision",
        "tokenizer",
        "chat_template",
        "temperature",
        "top_p",
        "seed",
    }
    assert sum(shard["rows"] for shard in manifest["shards"].values()) == manifest["answers"] == 20
    student = [
        "--output-dir",
        "run",
        "--max-steps",
        "1",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--max-length",
        "64",
    ]
    assert (
        cli.main(["distill", "teacher", "teacher", "--data", "out/conversations.jsonl", *student])
        == 0
    )
    assert "note: text was sampled at temperature 0.7" in capsys.readouterr().out


def test_a_second_call_generates_nothing_and_may_filter_differently(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command()) == 0
    first = rows("out")
    monkeypatch.setattr(LocalEngine, "answer_unit", lambda *_: pytest.fail("asked again"))
    assert (
        cli.main(
            command(
                "--min-characters",
                str(1 + min(len(row["messages"][1]["content"]) for row in first)),
            )
        )
        == 0
    )
    assert 0 < len(rows("out")) < len(first)
    assert {row["reason"] for row in rows("out", "dropped.jsonl")} == {"too_short"}


def test_the_commands_defaults_are_those_of_sampling() -> None:
    recipe = cli.parse(["generate", "teacher", "--prompts", "p", "--output-dir", "o"])[1]
    assert {name: getattr(recipe, name) for name in Sampling.__dataclass_fields__} == asdict(
        Sampling()
    )


@pytest.mark.parametrize("stops_at", [0, 1])
def test_an_interrupted_run_continues_to_the_same_rows(
    place: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    assert cli.main(command(output="whole")) == 0
    original, asked = LocalEngine.answer_unit, []

    def interrupted(self: Any, unit: Any) -> Any:
        asked.append(len(unit))
        if len(asked) == stops_at + 1:
            raise KeyboardInterrupt
        return original(self, unit)

    monkeypatch.setattr(LocalEngine, "answer_unit", interrupted)
    assert cli.main(command()) == 130
    assert not (place / "out" / "conversations.jsonl").exists()
    assert cli.main(command()) == 0
    assert sum(asked) == 20 + 4  # only the unit in flight is requested twice
    assert rows("out") == rows("whole")


def test_a_damaged_shard_is_reported_and_remade_with_the_same_rows(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command()) == 0
    before = rows("out")
    shard = place / "out" / "answers" / "00000.jsonl"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert cli.main(command()) == 0
    assert "00000.jsonl: damaged or missing; its answers are made again" in capsys.readouterr().out
    assert rows("out") == before


def test_several_samples_and_the_users_functions(place: Path) -> None:
    Path("mine.py").write_text(
        "def last(rows): return rows[-1]\n"
        "def keep(row): return '1' not in row['messages'][0]['content']\n"
    )
    assert (
        cli.main(command("--samples", "3", "--choose", "mine.py:last", "--filter", "mine.py:keep"))
        == 0
    )
    reasons = [row["reason"] for row in rows("out", "dropped.jsonl")]
    assert (len(rows("out")), reasons.count("user"), reasons.count("not_chosen")) == (9, 33, 18)
    assert cli.main(command("--samples", "3", "--choose", "likeliest", output="likely")) == 0
    by_prompt: dict[str, list[float]] = {}
    for row in [*rows("likely"), *rows("likely", "dropped.jsonl")]:
        by_prompt.setdefault(row["messages"][0]["content"], []).append(row["nats_per_token"])
    assert all(values[0] == min(values) and len(values) == 3 for values in by_prompt.values())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--temperature", "0.9"], "made with temperature 0.7, not 0.9; give another --output-dir"),
        (["--seed", "5"], "made with seed 0, not 5"),
        (["--samples", "2"], "made with samples 1, not 2"),
        (["--prompts", "others.jsonl"], "made with prompts"),
        (["--temperature", "-1"], "temperature -1.0: must be 0 or above"),
        (["--choose", "best"], "choose 'best' is not known"),
        (["--keep", "rude"], "--keep rude: no such reason"),
        (["--engine", "abacus"], "engine 'abacus' is not known"),
        (["--similarity", "0"], "similarity 0.0"),
        (["--script", "klingon"], "script 'klingon'"),
        (["--prompts", "broken.jsonl"], "broken.jsonl:2: not JSON"),
        (["--prompts", "answered.jsonl"], "answered.jsonl:1: no prompt there"),
        (["--prompts", "roles.jsonl"], "roles.jsonl:1: message 1 needs a role"),
        (["--prompts", "empty.jsonl"], "empty.jsonl: no prompt there"),
        (["--prompts", "gone.jsonl"], "gone.jsonl: cannot be read"),
        (["--max-characters", "0"], r"no answer is left (20 too_long)"),
        (["--server", "http://127.0.0.1:9"], "start the server, or check --server"),
        (["--filter", "nowhere.py:keep"], "nowhere.py:keep: no such function"),
    ],
)
def test_an_error_that_the_user_can_fix_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    write_prompts(place / "others.jsonl", 3)
    (place / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (place / "answered.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    (place / "roles.jsonl").write_text('{"messages": [{"role": "judge", "content": "a"}]}\n')
    (place / "empty.jsonl").touch()
    assert cli.main(command()) == 0
    before = rows("out")
    capsys.readouterr()
    assert cli.main(command(*flags)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("potstill: ")
    assert line in error.splitlines()[-1]
    assert rows("out") == before


@pytest.mark.parametrize("fills_up_at", ["answers", "conversations"])
def test_a_full_disk_is_one_line_and_the_same_command_continues(
    place: Path, fills_up_at: str
) -> None:
    """A limit on the file size simulates the disk: a write fails in the middle of a row."""
    assert cli.main(command(output="whole")) == 0
    answers = (place / "whole" / "answers" / "00000.jsonl").stat().st_size
    assert answers + 100 < (place / "whole" / "conversations.jsonl").stat().st_size
    limit = answers + 100 if fills_up_at == "conversations" else answers // 2
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from potstill import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    full = subprocess.run(
        [sys.executable, "-c", program, *command()],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert full.returncode == 2
    assert full.stderr.splitlines()[-1].startswith("potstill: ")
    assert full.stderr.splitlines()[-1].endswith("free space or choose another folder")
    assert "Traceback" not in full.stderr
    assert not [
        path.name
        for path in (place / "out").iterdir()
        if path.suffix == ".jsonl" or "unfinished" in path.name
    ]
    assert cli.main(command()) == 0
    assert rows("out") == rows("whole")


def environment() -> dict[str, str]:
    source = Path(cli.__file__).parent.parent
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_kills_at_random_instants_change_nothing(place: Path) -> None:
    """SIGKILL between the first and the last write; the data set has the same rows."""
    write_prompts(place / "prompts.jsonl", 400)
    more = ["--max-new-tokens", "48"]
    program = [sys.executable, "-m", "potstill"]
    begun = time.monotonic()
    subprocess.run(
        [*program, *command(*more, output="whole")],
        check=True,
        capture_output=True,
        env=environment(),
    )
    seconds = time.monotonic() - begun
    random.seed(0)
    kills = 0
    for _ in range(30):
        run = subprocess.Popen(
            [*program, *command(*more)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        shards = place / "out" / "answers"
        size = total(shards)
        while (
            run.poll() is None and total(shards) == size
        ):  # opening takes longer than answering: wait for the first write
            time.sleep(0.01)
        time.sleep(random.uniform(0, seconds / 60))
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
    subprocess.run([*program, *command(*more)], check=True, capture_output=True, env=environment())
    assert rows("out") == rows("whole")
    assert len(rows("out")) == 400
    keys = [
        row["key"]
        for shard in sorted((place / "out" / "answers").glob("*.jsonl"))
        for row in rows(shard.parent, shard.name)
    ]
    assert len(keys) == len(set(keys)) == 400
    assert kills >= 10


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.jsonl")) if folder.is_dir() else 0
